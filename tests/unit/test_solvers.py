"""Solvers: the oracle, diffusers' schedulers as references, and the order of convergence."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from kinema.diffusion.objective import DDPM, Objective, PredictionTarget, RectifiedFlow
from kinema.diffusion.schedules import BetaSchedule
from kinema.diffusion.solvers import FOR_TABLES, LIBRARY, STEPPERS, Solver, solve, visited_timesteps
from kinema.diffusion.timesteps import TimestepSpacing

TARGETS = PredictionTarget
OBJECTIVES = {
    "flow-velocity": RectifiedFlow(timestep_shift=3.0),
    "flow-data": RectifiedFlow(prediction_target=TARGETS.data),
    "ddpm-noise": DDPM(),
    "ddpm-noise-cosine": DDPM(beta_schedule=BetaSchedule.cosine),
    "ddpm-velocity": DDPM(prediction_target=TARGETS.velocity, zero_terminal_snr=True),
    "ddpm-data": DDPM(prediction_target=TARGETS.data, zero_terminal_snr=True),
}
SIZES = [(4, 3, 4, 6), (4, 1, 2, 2)]


def clips(seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=g, dtype=dtype) for size in SIZES]


def predictor(objective: Objective, denoise):
    """A network that is right about the data, `denoise(i, x, level)`, in the objective's own target."""

    def predict(noisy, timesteps):
        predictions = []
        levels = objective.levels(timesteps.double())
        for i, (x, level, t) in enumerate(zip(noisy, levels, timesteps, strict=True)):
            data = denoise(i, x, level)
            noise = (x - level.alpha * data) / level.sigma
            predictions += objective.target([data], [noise], t[None])
        return predictions

    return predict


@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
@pytest.mark.parametrize("solver", list(STEPPERS))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_with_the_true_prediction_sampling_returns_the_data(name, solver, num_steps):
    objective, data = OBJECTIVES[name], clips(0)
    predict = predictor(objective, lambda i, x, level: data[i])
    result = solve(predict, clips(1), objective, solver, num_steps)
    # float32 timesteps reach the oracle, as they reach a network.
    torch.testing.assert_close(result, data, rtol=0, atol=1e-4)


def test_the_oracle_is_exact_to_float64_on_the_straight_path():
    objective, data, noise = RectifiedFlow(), clips(0), clips(1)
    velocity = [e - x for x, e in zip(data, noise, strict=True)]
    for solver in STEPPERS:
        result = solve(lambda x, t: velocity, noise, objective, solver, 5)
        torch.testing.assert_close(result, data, rtol=0, atol=1e-14)


def network(noisy: torch.Tensor, t: float) -> torch.Tensor:
    """Some smooth function of the noisy clip and the timestep."""
    return torch.tanh(noisy.roll(1, dims=-1) * (1.2 - t)) - 0.3 * noisy * t + 0.1


def predict_with_network(noisy, timesteps):
    return [network(x, t) for x, t in zip(noisy, timesteps.tolist(), strict=True)]


def run_diffusers(scheduler, noise: torch.Tensor) -> torch.Tensor:
    x = noise
    for t in scheduler.timesteps:
        # Flow: t = 1000 * sigma, 0 is data. DDPM: row i is our (i + 1) / 1000.
        ours = t.item() / 1000 if hasattr(scheduler, "shift") else (t.item() + 1) / 1000
        x = scheduler.step(network(x, ours), t, x).prev_sample
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("spacing", list(TimestepSpacing))
def test_euler_is_flow_match_euler_of_diffusers(shift, spacing):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    if spacing is TimestepSpacing.trailing:
        scheduler.set_timesteps(sigmas=(torch.arange(12, 0, -1) / 12).tolist())
    else:
        scheduler.set_timesteps(12)
    noise = clips(0, torch.float32)
    objective = RectifiedFlow(timestep_shift=shift)
    ours = solve(predict_with_network, noise, objective, Solver.euler, 12, spacing=spacing)
    for clip, e in zip(ours, noise, strict=True):
        scheduler._step_index = None
        torch.testing.assert_close(clip, run_diffusers(scheduler, e), rtol=1e-4, atol=1e-5)


def test_heun_is_flow_match_heun_of_diffusers():
    scheduler = FlowMatchHeunDiscreteScheduler(num_train_timesteps=10)  # its grid ends at 1 / 10 then
    scheduler.set_timesteps(10)
    noise = clips(0, torch.float32)[0]
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.item() / 10), t, x).prev_sample
    objective = RectifiedFlow()
    torch.testing.assert_close(
        solve(predict_with_network, [noise], objective, Solver.heun, 10)[0], x, rtol=1e-4, atol=1e-5
    )


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("num_steps", [10, 25])
@pytest.mark.parametrize(
    ("target", "zero_terminal_snr"),
    [
        (TARGETS.noise, False),
        (TARGETS.velocity, False),
        (TARGETS.velocity, True),
        (TARGETS.data, False),
        (TARGETS.data, True),
    ],
)
def test_ddim_is_ddim_of_diffusers(target, zero_terminal_snr, num_steps):
    names = {TARGETS.noise: "epsilon", TARGETS.velocity: "v_prediction", TARGETS.data: "sample"}
    scheduler = DDIMScheduler(
        **BETAS,
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=names[target],
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    scheduler.set_timesteps(num_steps)
    objective = ddpm(target, zero_terminal_snr=zero_terminal_snr)
    noise = clips(0, torch.float32)
    ours = solve(predict_with_network, noise, objective, Solver.ddim, num_steps)
    for clip, e in zip(ours, noise, strict=True):
        torch.testing.assert_close(clip, run_diffusers(scheduler, e), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("num_steps", [2, 10, 20])
@pytest.mark.parametrize("target", list(TARGETS))
def test_dpmpp_2m_is_dpm_solver_multistep_of_diffusers(target, num_steps):
    names = {TARGETS.noise: "epsilon", TARGETS.velocity: "v_prediction", TARGETS.data: "sample"}
    scheduler = DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing", prediction_type=names[target])
    scheduler.set_timesteps(num_steps)
    noise = clips(0, torch.float32)
    ours = solve(predict_with_network, noise, ddpm(target), Solver.dpmpp_2m, num_steps)
    for clip, e in zip(ours, noise, strict=True):
        scheduler.set_timesteps(num_steps)
        torch.testing.assert_close(clip, run_diffusers(scheduler, e), rtol=2e-3, atol=2e-4)


def ddpm(target: PredictionTarget, *, zero_terminal_snr: bool = False) -> DDPM:
    return DDPM(
        prediction_target=target,
        beta_schedule=BetaSchedule.scaled_linear,
        beta_start=0.00085,
        beta_end=0.012,
        zero_terminal_snr=zero_terminal_snr,
    )


MEAN, STD = 0.7, 0.5


def denoise_gaussian(i, x, level):
    """The best guess of data ~ Normal(MEAN, STD) is linear in the noisy clip."""
    return MEAN + STD**2 * level.alpha / spread(level) ** 2 * (x - level.alpha * MEAN)


def spread(level):
    return (level.alpha**2 * STD**2 + level.sigma**2) ** 0.5


def gaussian_error(objective: Objective, solver: Solver, times: torch.Tensor) -> float:
    """Error after stepping over `times`, against the ODE in closed form: only the spread changes."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    first, last = objective.levels(times[[0, -1]])
    exact = last.alpha * MEAN + spread(last) / spread(first) * (x - first.alpha * MEAN)
    predict = predictor(objective, denoise_gaussian)
    result = STEPPERS[solver](predict, [x], objective, times[:, None], lambda *_: None)[0]
    return (result - exact).abs().max().item()


@pytest.mark.parametrize("name", ["flow-velocity", "ddpm-noise", "ddpm-data"])
@pytest.mark.parametrize(
    ("solver", "order"), [(Solver.euler, 1), (Solver.ddim, 1), (Solver.heun, 2), (Solver.dpmpp_2m, 2)]
)
def test_order_of_convergence(name, solver, order):
    grids = (torch.linspace(0.9, 0.3, n + 1, dtype=torch.float64) for n in (40, 80))
    coarse, fine = (gaussian_error(OBJECTIVES[name], solver, grid) for grid in grids)
    measured = math.log2(coarse / fine)
    assert abs(measured - order) < 0.1, f"{measured:.2f}"


FOR_FLOWS = [solver for solver in Solver if solver not in FOR_TABLES]


@pytest.mark.parametrize("solver", LIBRARY)
@pytest.mark.parametrize("name", ["flow-data", "ddpm-noise", "ddpm-data"])
def test_the_librarys_solvers_follow_our_objectives(name, solver):
    objective, data = OBJECTIVES[name], clips(0)
    predict = predictor(objective, lambda i, x, level: data[i])
    if name == "flow-data" and solver in FOR_TABLES:
        with pytest.raises(ValueError, match="steps over a table"):
            solve(predict, clips(1), objective, solver, 20)
        return
    result = solve(predict, clips(1), objective, solver, 20)
    torch.testing.assert_close(result, data, rtol=0, atol=1e-4)


def test_the_library_is_told_what_contradicts_or_is_unknown():
    for wrong in ({"flow_shift": 2.0}, {"solver_ordr": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            solve(predict_with_network, clips(0), RectifiedFlow(), Solver.unipc, 3, scheduler=wrong)
    with pytest.raises(ValueError, match="is not of the library"):
        solve(predict_with_network, clips(0), RectifiedFlow(), Solver.euler, 3, scheduler={"solver_order": 3})
    with pytest.raises(ValueError, match="timestep_spacing=linspace"):
        solve(predict_with_network, clips(0), RectifiedFlow(), Solver.unipc, 3, spacing=TimestepSpacing.linspace)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_solver_finds_the_data_from_pure_noise(shift):
    objective = RectifiedFlow(timestep_shift=shift)
    errors = {s: gaussian_error(objective, s, objective.sampling_timesteps(100)) for s in STEPPERS}
    assert max(errors.values()) < 0.03
    assert max(errors[Solver.heun], errors[Solver.dpmpp_2m]) < errors[Solver.euler] / 5


def test_ddim_and_euler_are_one_method():
    for objective in OBJECTIVES.values():
        a, b = (solve(predict_with_network, clips(0), objective, solver, 8) for solver in (Solver.ddim, Solver.euler))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("solver", FOR_FLOWS)
def test_clips_of_different_sizes_do_not_touch(solver):
    objective = RectifiedFlow(timestep_shift=2.0, shift_base_tokens=16)
    tokens = [72, 4]
    together = solve(predict_with_network, clips(0), objective, solver, 6, num_tokens=tokens)
    for i, noise in enumerate(clips(0)):
        alone = solve(predict_with_network, [noise], objective, solver, 6, num_tokens=[tokens[i]])
        torch.testing.assert_close(together[i], alone[0])


def test_the_sampler_uses_the_training_shift_unless_told_otherwise():
    visited: list[float] = []

    def watch(noisy, timesteps):
        visited.append(timesteps[0].item())
        return noisy

    objective = RectifiedFlow(timestep_shift=3.0)
    solve(watch, clips(0), objective, Solver.euler, 4)
    torch.testing.assert_close(torch.tensor(visited), torch.tensor([1.0, 0.9, 0.75, 0.5]))
    visited.clear()
    solve(watch, clips(0), objective, Solver.euler, 4, shift=1.0)
    torch.testing.assert_close(torch.tensor(visited), torch.tensor([1.0, 0.75, 0.5, 0.25]))


@pytest.mark.parametrize("solver", FOR_FLOWS)
def test_state_stays_float32_and_timesteps_too_when_the_network_is_bfloat16(solver):
    seen = set()

    def predict(noisy, timesteps):
        seen.update([timesteps.dtype, *(x.dtype for x in noisy)])
        return [x.bfloat16() for x in noisy]

    steps = []
    noise = [e.bfloat16() for e in clips(0)]
    result = solve(predict, noise, RectifiedFlow(), solver, 3, progress=lambda step, n: steps.append((step, n)))
    assert seen == {torch.float32}
    assert {x.dtype for x in result} == {torch.float32}
    assert steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("solver", "calls"), [(Solver.euler, 5), (Solver.ddim, 5), (Solver.dpmpp_2m, 5), (Solver.heun, 9)]
)
def test_network_calls(solver, calls):
    count = 0

    def predict(noisy, timesteps):
        nonlocal count
        count += 1
        assert (timesteps > 0).all()  # nothing to ask at t = 0
        return noisy

    solve(predict, clips(0), RectifiedFlow(), solver, 5)
    assert count == calls


@pytest.mark.parametrize("solver", [Solver.euler, Solver.dpmpp_2m, Solver.unipc])
def test_a_step_that_breaks_is_named(solver):
    def broken(noisy, timesteps):
        predictions = predict_with_network(noisy, timesteps)
        if timesteps[0] < 0.7:
            predictions[1] = predictions[1] / 0
        return predictions

    steps = []
    with pytest.raises(ValueError, match=rf"solver={solver.value}: the latents of clips \[1\].*after step 3 of 5"):
        solve(broken, clips(0), RectifiedFlow(), solver, 5, progress=lambda step, num_steps: steps.append(step))
    assert steps == [1, 2]


def test_unipc_in_one_step_by_bh1_is_refused():
    """The library computes 0 / 0 there."""
    options = {"solver_type": "bh1", "solver_order": 1}
    with pytest.raises(ValueError, match=r"solver=unipc.*step 1 of 1"):
        solve(predict_with_network, clips(0), RectifiedFlow(), Solver.unipc, 1, scheduler=options)


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        *((solver, "flow-velocity") for solver in Solver if solver not in FOR_TABLES),
        *((solver, "ddpm-velocity") for solver in FOR_TABLES),
    ],
)
def test_the_record_of_visited_timesteps_is_where_the_model_is_asked(solver, name):
    asked = []

    def watched(noisy, timesteps):
        asked.append(timesteps[0].item())
        return predict_with_network(noisy, timesteps)

    options = {"shift": 5.0} if name == "flow-velocity" else {}
    solve(watched, clips(0)[:1], OBJECTIVES[name], solver, 4, **options)
    visited = visited_timesteps(OBJECTIVES[name], solver, 4, **options)
    assert visited[-1] == 0
    assert visited.shape == (5,)
    assert sorted(set(asked), reverse=True) == pytest.approx(visited[:-1].tolist(), abs=1e-6)
