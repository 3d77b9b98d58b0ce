"""Each mutant is an optimizer with one mistake that people make; the kit must name that mistake."""

import random

import pytest
import torch

from altgrad_core.random_bits import uniform
from altgrad_core.testing import ConformanceError
from altgrad_core.testing.optimizers import check_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")


class Sound(torch.optim.Optimizer):
    """Momentum with a little noise; everything a mutant changes is a method of its own."""

    def __init__(self, groups, lr=0.05):
        super().__init__(groups, {"lr": lr, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if parameter.grad.is_sparse:
                        self.refuse_sparse()
                    self.update(group, parameter, parameter.grad)
        return loss

    def evaluated(self, closure):
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def refuse_sparse(self):
        raise RuntimeError("Sound does not support sparse gradients")

    def state_of(self, parameter):
        state = self.state[parameter]
        if not state:
            state["velocity"], state["step"] = torch.zeros_like(parameter), 0
        return state

    def update(self, group, parameter, gradient):
        state = self.state_of(parameter)
        state["step"] += 1
        noise = uniform((0, state["step"], 0), parameter.shape) - 0.5
        velocity = state["velocity"].mul_(group["momentum"]).add_(gradient)
        parameter.sub_((velocity + 0.01 * noise) * self.lr(group))

    def lr(self, group):
        return group["lr"]


MUTANTS = []


def mutant(message):
    """Register a wrong optimizer with what the kit must say about it."""

    def register(cls):
        MUTANTS.append(pytest.param(cls, message, id=cls.__name__))
        return cls

    return register


@pytest.mark.parametrize(
    "make",
    [
        Sound,
        lambda groups: torch.optim.AdamW(groups, lr=0.05),
        lambda groups: torch.optim.AdamW(groups, lr=0.05, fused=True),
        lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
        lambda groups: torch.optim.RMSprop(groups, lr=0.02),
    ],
)
def test_sound_optimizers_conform(make):
    check_optimizer(make)


@pytest.mark.parametrize(("wrong", "message"), MUTANTS)
def test_the_kit_names_what_is_wrong(wrong, message):
    with pytest.raises(ConformanceError) as caught:
        check_optimizer(wrong)
    assert message in str(caught.value)
    assert "fix: " in str(caught.value)


def test_the_global_random_state_is_left_alone_by_the_kit_itself():
    before = torch.get_rng_state()
    check_optimizer(Sound)
    assert torch.equal(torch.get_rng_state(), before)


# --- the mutants ----------------------------------------------------------------------------------------


@mutant("make must return a torch.optim.Optimizer")
class NotAnOptimizer:
    def __init__(self, groups):
        self.param_groups = groups


@mutant("param_groups must be the groups it was given")
class MergesGroups(Sound):
    def __init__(self, groups):
        super().__init__([one for group in groups for one in group["params"]])


@mutant("every group must have every option")
class HasNoOptions(Sound):
    def __init__(self, groups):
        super().__init__(groups)
        for group in self.param_groups:
            del group["momentum"]


@mutant("ten steps must move every parameter")
class ForgetsVectors(Sound):
    def update(self, group, parameter, gradient):
        if parameter.dim() > 1:
            super().update(group, parameter, gradient)


@mutant("a group whose lr is 0 must not move")
class HasOneLearningRate(Sound):
    def lr(self, group):
        return self.defaults["lr"]


@mutant("the lr of one group must not stop the others")
class ReadsTheFirstGroupsLr(Sound):
    def lr(self, group):
        return group["lr"] * all(one["lr"] for one in self.param_groups)


@mutant("load_state_dict must resume to the bit")
class ForgetsItsCounter(Sound):
    counter = 0

    def update(self, group, parameter, gradient):
        self.counter += 1
        super().update(group, parameter, gradient + uniform((1, self.counter, 0), gradient.shape))


@mutant("state_dict()/generator: state must be tensors, numbers, text, lists and tables, not Generator")
class SavesAnObject(Sound):
    def state_dict(self):
        return super().state_dict() | {"generator": torch.Generator()}


@mutant("at lr 0 nothing must move")
class KeepsItsFirstLr(Sound):
    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        self.param_groups[-1]["own_lr"] = self.param_groups[-1]["lr"]

    def lr(self, group):
        return group["own_lr"]


@mutant("when lr comes back, weights must move again")
class StopsForGood(Sound):
    def lr(self, group):
        group["stopped"] = group.get("stopped", False) or (group["lr"] == 0 and "initial_lr" in group)
        return 0.0 if group["stopped"] else group["lr"]


@mutant("step(closure) must evaluate it once")
class EvaluatesTwice(Sound):
    def evaluated(self, closure):
        super().evaluated(closure)
        return super().evaluated(closure)


@mutant("step(closure) must evaluate it once")
class EvaluatesWithoutGradients(Sound):
    def evaluated(self, closure):
        return closure() if closure else None


@mutant("step(closure) must return the closure's loss")
class LosesTheLoss(Sound):
    def evaluated(self, closure):
        super().evaluated(closure)


@mutant("step() must return None")
class ReturnsSomething(Sound):
    def evaluated(self, closure):
        return super().evaluated(closure) if closure else 0.0


@mutant("a parameter whose grad is None must stay")
class CoastsWithoutGradient(Sound):
    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    self.update(group, parameter, torch.zeros_like(parameter))
        return loss


@mutant("while checking that parameters without a gradient stay as they are")
class NeedsEveryGradient(Sound):
    @torch.no_grad()
    def step(self, closure=None):
        torch.stack([one.grad.norm() for group in self.param_groups for one in group["params"]])
        return super().step(closure)


@mutant("step must not modify gradients")
class ModifiesGradients(Sound):
    def update(self, group, parameter, gradient):
        super().update(group, parameter, gradient.mul_(1.5))


@mutant("step must not modify gradients")
class ReplacesGradients(Sound):
    def update(self, group, parameter, gradient):
        super().update(group, parameter, gradient)
        parameter.grad = gradient.clone()


@mutant("making it must not touch global random states")
class SeedsFromTheGlobalState(Sound):
    def __init__(self, groups):
        super().__init__(groups)
        self.seed = random.random()


@mutant("step must not touch global random states")
class DrawsFromTheGlobalState(Sound):
    def update(self, group, parameter, gradient):
        torch.rand(3)
        super().update(group, parameter, gradient)


@mutant("AttributeError")
class LosesAnAttributeInCopies(Sound):
    def __init__(self, groups):
        super().__init__(groups)
        self.sign = 1.0

    def lr(self, group):
        return self.sign * group["lr"]


@mutant("a deep copy must train on as the original does")
class ForgetsInCopies(Sound):
    factor = 1.0

    def __init__(self, groups):
        super().__init__(groups)
        self.factor = 0.5

    def lr(self, group):
        return self.factor * group["lr"]


@mutant("a deep copy must have weights of its own")
class IsItsOwnCopy(Sound):
    def __deepcopy__(self, memo):
        return self


@mutant("a sparse gradient must be refused")
class IgnoresSparseGradients(Sound):
    def update(self, group, parameter, gradient):
        if not gradient.is_sparse:
            super().update(group, parameter, gradient)

    def refuse_sparse(self):
        pass


@mutant("seen: TypeError: no sparse, please")
class RaisesSomethingElse(Sound):
    def refuse_sparse(self):
        raise TypeError("no sparse, please")


@mutant("training must reduce a quadratic")
class Climbs(Sound):
    def lr(self, group):
        return -0.01 * group["lr"]


@mutant("while checking that add_param_group works")
class PreparesItsStateOnce(Sound):
    def __init__(self, groups):
        super().__init__(groups)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"velocity": torch.zeros_like(parameter), "step": 0}

    def state_of(self, parameter):
        return {"velocity": self.state[parameter]["velocity"], **self.state[parameter]}


@mutant("a group added later must train too")
class KnowsItsFirstParametersOnly(Sound):
    def __init__(self, groups):
        super().__init__(groups)
        self.defaults["known"] = [id(one) for group in self.param_groups for one in group["params"]]

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("late", "known" in self.defaults)
        self.param_groups[-1].setdefault("known", [])

    def lr(self, group):
        return 0.0 if group["late"] else group["lr"]


@mutant("zero_grad must clear")
class ClearsNothing(Sound):
    def zero_grad(self, set_to_none=True):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.zero_()


@mutant("float64")
class WorksInFloat32(Sound):
    def state_of(self, parameter):
        state = self.state[parameter]
        if not state:
            state["velocity"], state["step"] = torch.zeros(parameter.shape), 0
        return state

    def update(self, group, parameter, gradient):
        super().update(group, parameter, gradient)
        parameter.data = parameter.data.float()


@mutant("a NaN gradient must be seen")
class HidesNan(Sound):
    def update(self, group, parameter, gradient):
        super().update(group, parameter, gradient.nan_to_num())


@mutant("step hooks must be called")
class StepsPastItsHooks(Sound):
    def __init__(self, groups):
        super().__init__(groups)
        self.step = super().step.__wrapped__.__get__(self)


@mutant("threads must not change bits")
class DependsOnThreads(Sound):
    def update(self, group, parameter, gradient):
        super().update(group, parameter, gradient * torch.get_num_threads())
