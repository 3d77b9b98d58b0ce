"""Discovery, look-up, collisions and broken plugins, on fake distributions in a folder."""

import importlib.metadata
import sys

import pytest

from altgrad_core.experiment_file import load_experiment
from altgrad_core.registry import (
    CORE_DISTRIBUTION,
    ConflictError,
    NotFoundError,
    PluginError,
    Registry,
    UsageError,
    discover,
)


def monitors(*names, target="math:sqrt"):
    """Return the source of a plugin that registers monitors of these names."""
    made = ", ".join(f"Component(name={name!r}, summary='watches', target={target!r})" for name in names)
    return f"""
@hookimpl
def altgrad_monitors():
    return [{made}]
"""


def names_of(registry, kind="monitor"):
    return [entry.name for entry in registry.of_kind(kind)]


def reason_of(registry):
    (broken,) = registry.broken
    return broken.reason


# --- discovery ---------------------------------------------------------------------------------------


def test_the_core_registers_its_own_components_first(install):
    install("aaa", monitors("m"))
    registry = discover()
    assert names_of(registry, "stiffness") == ["grid", "uniform"]
    assert names_of(registry, "executor") == ["local"]
    assert registry.registered[0].distribution == CORE_DISTRIBUTION


def test_plugins_are_sorted_by_the_name_of_their_distribution(install):
    install("zebra", monitors("z"))
    install("Alpha_one", monitors("a"))
    install("mid", monitors("m"))
    assert names_of(discover()) == ["a", "m", "z"]


def test_a_component_knows_its_distribution_and_version(install):
    install("my-plugin", monitors("m"), version="2.5")
    found = discover().find("monitor", "m")
    assert (found.distribution, found.version, found.owner) == ("my-plugin", "2.5", "my-plugin 2.5")


def test_two_distributions_with_one_entry_point_name_are_both_seen(install):
    install("one", monitors("a"), entry_points="[altgrad]\nsame = {module}\n")
    install("two", monitors("b"), entry_points="[altgrad]\nsame = {module}\n")
    assert names_of(discover()) == ["a", "b"]


def test_an_entry_point_may_name_an_object_in_a_module(install):
    source = """
    class Plugin:
        @hookimpl
        def altgrad_monitors(self):
            return [Component(name="m", summary="", target="math:sqrt")]
    plugin = Plugin()
    """
    install("one", source, entry_points="[altgrad]\nx = {module}:plugin\n")
    assert names_of(discover()) == ["m"]


def test_the_first_of_two_installed_copies_wins(install, tmp_path, monkeypatch):
    install("one", monitors("new"))
    older = tmp_path / "older" / "one-0.9.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: One\nVersion: 0.9\n")
    (older / "entry_points.txt").write_text("[altgrad]\nplugin = no_such_module\n")
    both = importlib.metadata.distributions
    monkeypatch.setattr(
        importlib.metadata, "distributions", lambda: [*both(), *both(path=[str(tmp_path / "older")])]
    )
    registry = discover()
    assert names_of(registry) == ["new"]
    assert not registry.broken


def test_a_malformed_entry_points_file_of_somebody_else_is_passed_over(install):
    install("somebody-else", "", entry_points="[console_scripts]\nno equals sign\n")
    install("one", monitors("m"))
    registry = discover()
    assert names_of(registry) == ["m"]
    assert not registry.broken


# --- broken plugins ----------------------------------------------------------------------------------

HOOK = "@hookimpl\ndef altgrad_monitors():\n    return "
M = 'Component(name="m", summary="s", target="a:b")'

BROKEN = {
    "raises at import": ("1 / 0", "ZeroDivisionError: division by zero"),
    "lacks a dependency": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "exits at import": ("raise SystemExit(3)", "SystemExit: 3"),
    "is no Python": ("def", "SyntaxError: invalid syntax (fake_plugin"),
    "raises in a hook": (f"{HOOK}1 / 0", "ZeroDivisionError: division by zero"),
    "exits in a hook": ("import sys\n" + f"{HOOK}sys.exit()", "SystemExit"),
    "says more than a line": (
        "raise ValueError('one\\n  two')",
        "ValueError: one two",
    ),
    "has a misspelt hook": (
        HOOK.replace("altgrad_monitors", "altgrad_monitor") + "[]",
        "unknown hook 'altgrad_monitor'; did you mean 'altgrad_monitors'?",
    ),
    "has a misspelt optional hook": (
        "@hookimpl(optionalhook=True)\ndef altgrad_mon(): return []",
        "unknown hook 'altgrad_mon'",
    ),
    "forgets the marker": (
        "def altgrad_monitors(): return []",
        "altgrad_monitors is not marked with altgrad_core.hookspecs.hookimpl",
    ),
    "marks for another project": (
        "import pluggy\n@pluggy.HookimplMarker('pytest')\ndef altgrad_monitors(): return []",
        "altgrad_monitors is not marked with altgrad_core.hookspecs.hookimpl",
    ),
    "has no hook": ("x = 1", "implements no hook; the hooks are: altgrad_formats, "),
    "has a hook with an argument": (
        "@hookimpl\ndef altgrad_monitors(config): return []",
        "Argument(s) {'config'} are declared in the hookimpl but can not be found",
    ),
    "forgets to return": (f"{HOOK}None", "altgrad_monitors must return a list of Component, it returns None"),
    "wraps a hook": (
        "@hookimpl(wrapper=True)\ndef altgrad_monitors():\n    return (yield)",
        "altgrad_monitors must return a list of Component, it returns None",
    ),
    "returns a component": (
        f"{HOOK}{M}",
        "altgrad_monitors must return a list of Component, not Component(name='m'",
    ),
    "returns other things": (
        f"{HOOK}[{{'name': 'm'}}]",
        "altgrad_monitors must return a list of Component, it holds {'name': 'm'}",
    ),
    "returns text": (f"{HOOK}'ab'", "altgrad_monitors must return a list of Component, it holds 'a'"),
    "makes a component without a target": (f"{HOOK}[Component(name='m', summary='')]", "TypeError: "),
    "names with a space": (HOOK + f"[{M}]".replace('"m"', '"a b"'), "the name 'a b' must be text"),
    "names with a colon": (HOOK + f"[{M}]".replace('"m"', '"a:b"'), "the name 'a:b' must be text"),
    "names with a slash": (HOOK + f"[{M}]".replace('"m"', '"a/b"'), "the name 'a/b' must be text"),
    "names with nothing": (HOOK + f"[{M}]".replace('"m"', '""'), "the name '' must be text"),
    "names with a number": (HOOK + f"[{M}]".replace('"m"', "8"), "the name 8 must be text"),
    "names with a control character": (
        HOOK + f"[{M}]".replace('"m"', '"a\\x1b"'),
        "the name 'a\\x1b' must be text",
    ),
    "takes a reserved name": (
        HOOK.replace("monitors", "formats") + f"[{M}]".replace('"m"', '"FP32"'),
        "altgrad_formats: the name 'FP32' means 'leave it alone'; choose another",
    ),
    "has a summary of two lines": (
        HOOK + f"[{M}]".replace('"s"', '"a\\nb"'),
        "the summary of 'm' must be one line of text",
    ),
    "has a target without attribute": (
        HOOK + f"[{M}]".replace('"a:b"', '"a.b"'),
        "target of 'm' must be 'package.module:attribute', not 'a.b'",
    ),
    "has an object as target": (
        HOOK + f"[{M}]".replace('"a:b"', "print"),
        "target of 'm' must be 'package.module:attribute', not <built-in function print>",
    ),
    "has options of no class": (
        HOOK + f"[{M}]".replace("summary", "options={}, summary"),
        "options of 'm' must be a frozen attrs class, not {}",
    ),
    "has options that are not attrs": (
        HOOK + f"[{M}]".replace("summary", "options=dict, summary"),
        "options of 'm' must be a frozen attrs class, not <class 'dict'>",
    ),
    "has options that can change": (
        "@attrs.define\nclass O: pass\n" + HOOK + f"[{M}]".replace("summary", "options=O, summary"),
        "options of 'm' must be a frozen attrs class, not <class 'fake_plugin",
    ),
    "registers a name twice": (f"{HOOK}[{M}, {M}]", "registers the monitor 'm' twice"),
}


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_plugin_is_listed_as_broken_and_hides_nothing_where_it(install, source, reason):
    install("bad-plugin", source, version="0.3")
    install("good", monitors("fine"))
    registry = discover()
    assert names_of(registry) == ["fine"]
    (broken,) = registry.broken
    assert (broken.distribution, broken.version) == ("bad-plugin", "0.3")
    assert reason in broken.reason
    assert "\n" not in broken.reason


def test_a_hook_may_yield_its_components(install):
    source = "@hookimpl\ndef altgrad_monitors():\n    yield Component(name='m', summary='', target='a:b')"
    install("one", source)
    assert names_of(discover()) == ["m"]


def test_one_name_may_serve_two_kinds(install):
    install("one", monitors("m") + monitors("m").replace("monitors", "fallbacks"))
    registry = discover()
    assert names_of(registry) == names_of(registry, "fallback") == ["m"]


def test_an_entry_point_that_leads_nowhere_is_broken(install):
    install("one", "", entry_points="[altgrad]\nx = no_such_module\n")
    assert reason_of(discover()) == "ModuleNotFoundError: No module named 'no_such_module'"


def test_an_entry_point_to_a_missing_attribute_is_broken(install):
    install("one", "", entry_points="[altgrad]\nx = {module}:nothing\n")
    assert "has no attribute 'nothing'" in reason_of(discover())


def test_an_entry_point_without_a_module_is_broken(install):
    install("one", "", entry_points="[altgrad]\nno equals sign\n")
    assert reason_of(discover()).startswith("its entry_points.txt is malformed: ")


def test_a_distribution_has_one_entry_point(install):
    install("one", monitors("a"), entry_points="[altgrad]\nx = {module}\ny = {module}\n")
    assert reason_of(discover()) == "has 2 entry points in the group 'altgrad', not one"


def test_a_leftover_of_an_interrupted_installation_is_broken_and_hides_nothing(install):
    install("left-over", "", entry_points="[altgrad]\nx = no_such_module\n", metadata=False)
    install("one", monitors("m"))
    registry = discover()
    assert names_of(registry) == ["m"]
    assert str(registry.broken[0]).startswith("unknown unknown (ModuleNotFoundError")


# --- look-up -----------------------------------------------------------------------------------------


def test_a_name_that_is_not_found_gets_a_suggestion_whatever_its_case(install):
    install("one", monitors("stall", "rank"))
    message = r"no monitor named 'STAL' is installed; did you mean 'stall'\?"
    with pytest.raises(NotFoundError, match=message):
        discover().find("monitor", "STAL")


def test_a_name_like_no_other_gets_the_list(install):
    install("one", monitors("stall", "rank"))
    with pytest.raises(NotFoundError, match="no monitor named 'xyz' is installed; there are: rank, stall"):
        discover().find("monitor", "xyz")


def test_a_kind_without_components_says_so(install):
    with pytest.raises(NotFoundError, match="no format named 'xyz' is installed; there are: none"):
        Registry().find("format", "xyz")


def test_the_names_that_mean_no_format_are_suggested(install):
    with pytest.raises(NotFoundError, match="did you mean 'FP32'"):
        Registry().find("format", "fp32")


def test_a_name_of_another_kind_is_told(install):
    install("one", monitors("stall"))
    with pytest.raises(NotFoundError, match="'stall' is the name of another kind of component: monitor"):
        discover().find("fallback", "stall")


def test_broken_plugins_are_named_where_a_name_is_not_found(install):
    module = install("bad", "1 / 0", version="0.3")
    message = (
        rf"broken plugins, where it may be: bad 0\.3 \(ZeroDivisionError: division by zero \({module}\.py:"
    )
    with pytest.raises(NotFoundError, match=message):
        discover().find("monitor", "stall")


def test_a_qualified_name_is_looked_up_in_its_distribution(install):
    install("my-plugin", monitors("m"))
    registry = discover()
    assert registry.find("monitor", "My_Plugin:m") == registry.find("monitor", "m")
    message = r"^no monitor named 'other:m' is installed; did you mean 'm'\?$"
    with pytest.raises(NotFoundError, match=message):
        registry.find("monitor", "other:m")


def test_two_owners_of_a_name_are_an_error_that_names_both_and_the_way_out(install):
    install("one", monitors("m"), version="1.1")
    install("two", monitors("m"), version="2.2")
    registry = discover()
    with pytest.raises(ConflictError) as caught:
        registry.find("monitor", "m")
    assert str(caught.value) == (
        'monitor \'m\' is owned by one 1.1 and two 2.2; say which: plugin = "one:m" or plugin = "two:m"'
    )
    assert registry.find("monitor", "two:m").version == "2.2"
    assert [owners[0].name for owners in registry.conflicts()] == ["m"]


def test_a_name_of_the_core_can_be_taken_only_by_its_full_name(install):
    install("one", monitors("grid").replace("monitors", "stiffness"))
    registry = discover()
    with pytest.raises(ConflictError, match="altgrad-core"):
        registry.find("stiffness", "grid")
    assert registry.find("stiffness", "altgrad-core:grid").distribution == CORE_DISTRIBUTION


# --- leaving distributions out -----------------------------------------------------------------------


@pytest.mark.parametrize("written", ["my-plugin", "My_Plugin", "my.plugin", " MY-PLUGIN "])
def test_a_distribution_can_be_left_out_however_its_name_is_written(install, written):
    install("My-Plugin", "1 / 0")
    install("other", monitors("m"))
    registry = discover(without=[written])
    assert not registry.broken
    assert registry.blocked == ("my-plugin",)
    assert names_of(registry) == ["m"]


def test_the_environment_leaves_distributions_out(install, monkeypatch):
    for name in ("one", "two", "three"):
        install(name, monitors(name))
    monkeypatch.setenv("ALTGRAD_WITHOUT", "one, TWO,")
    assert names_of(discover()) == ["three"]
    assert names_of(discover(without=["three"])) == []


def test_leaving_out_what_is_not_there_is_an_error(install):
    install("one", monitors("m"))
    with pytest.raises(UsageError, match=r"'onne': no such plugin is installed; did you mean 'one'\?"):
        discover(without=["onne"])
    with pytest.raises(UsageError, match="'xyz': no such plugin is installed; there are: one"):
        discover(without=["xyz"])


def test_what_was_left_out_is_named_where_a_name_is_not_found(install):
    install("one", monitors("m"))
    with pytest.raises(NotFoundError, match=r"left out by --without or \$ALTGRAD_WITHOUT: one"):
        discover(without=["one"]).find("monitor", "m")


def test_a_plugin_that_is_left_out_is_not_imported(install):
    module = install("one", monitors("m"))
    discover(without=["one"])
    assert module not in sys.modules


# --- targets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module:x", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("math:nothing", "AttributeError: module 'math' has no attribute 'nothing'"),
    ],
)
def test_a_target_that_cannot_be_loaded_names_its_owner(install, target, reason):
    install("one", monitors("m", target=target), version="1.2")
    with pytest.raises(PluginError) as caught:
        discover().find("monitor", "m").load()
    expected = f"monitor 'm' of one 1.2: its target {target!r} cannot be loaded: {reason}"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("body", "reason"), [("1 / 0", "ZeroDivisionError: division by zero"), ("exit(4)", "SystemExit: 4")]
)
def test_a_target_that_cannot_be_built_names_its_owner(install, body, reason):
    helper = install("helper", f"def build(options): {body}\n{monitors('other')}")
    install("one", monitors("m", target=f"{helper}:build"), version="1.2")
    with pytest.raises(PluginError) as caught:
        discover().find("monitor", "m").build(None)
    assert str(caught.value) == f"monitor 'm' of one 1.2 cannot be built: {reason} ({helper}.py:4)"


def test_a_module_that_exits_when_its_target_is_loaded_does_not_end_the_process(install):
    helper = install("helper", "raise SystemExit(5)")
    install("one", monitors("m", target=f"{helper}:build"))
    with pytest.raises(PluginError, match="SystemExit: 5"):
        discover().find("monitor", "m").load()


def test_a_users_mistake_passes_through_a_target(install):
    source = (
        "from altgrad_core.registry import UsageError\ndef build(options): raise UsageError('no file x')\n"
    )
    helper = install("helper", source + monitors("other"))
    install("one", monitors("m", target=f"{helper}:build"))
    with pytest.raises(UsageError, match=r"^no file x$"):
        discover().find("monitor", "m").build(None)


def test_a_target_is_called_with_options_and_inputs(install):
    helper = install("helper", "def build(*given): return given\n" + monitors("other"))
    install("one", monitors("m", target=f"{helper}:build"))
    assert discover().find("monitor", "m").build("options", 1, 2) == ("options", 1, 2)


def test_a_target_that_is_no_function_is_the_component_itself(install):
    install("one", monitors("m", target="math:pi"))
    assert discover().find("monitor", "m").build(None) == pytest.approx(3.14159265)


def test_in_a_notebook_a_registry_is_its_components_and_reads_like_the_command(registered):
    entries = (registered("format", "E9M9"), registered("monitor", "flip"))
    found = Registry(registered=entries, blocked=("acme",))
    assert (list(found), len(found)) == (list(entries), 2)
    assert repr(found).splitlines() == [
        "format   E9M9  fake-plugins 1.0",
        "monitor  flip  fake-plugins 1.0",
        "",
        "left out: acme",
    ]
    assert repr(Registry()) == "no plugin is installed"


def test_a_registry_without_components_is_one_all_the_same(tmp_path):
    path = tmp_path / "e.toml"
    path.write_text('name = "e"')
    with pytest.raises(UsageError, match="no dataset named 'licenses' is installed"):
        load_experiment(path, (), Registry())
