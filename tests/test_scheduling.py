# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import math

import numpy as np
import pytest
import sit_golden
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from gpstoken_hf.scheduling_flow_match_sde import (
    DIFFUSION_FORMS,
    LAST_STEPS,
    FlowMatchSDEScheduler,
    diffusion_coefficient,
    score,
)

MULTISTEP = (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler)


def guided_model(name: str):
    """The golden model as a function of (x, timestep), guided inside of the golden interval."""
    model, golden = sit_golden.load_model(name), sit_golden.load_arrays(name)
    guidance = sit_golden.load_config(name)["cfg"]
    null = torch.full_like(golden["cfg_y"], model.null_class)

    @torch.no_grad()
    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        labelled = model(x, timestep, golden["cfg_y"], golden["cfg_cond"]).sample
        if not guidance["low"] <= 1 - timestep / 1000 <= guidance["high"]:
            return labelled
        unlabelled = model(x, timestep, null, golden["cfg_cond"]).sample
        return unlabelled + guidance["scale"] * (labelled - unlabelled)

    return predict, golden


@pytest.mark.parametrize("name", sit_golden.available_sets())
def test_sde_trajectory_matches_the_release(name):
    predict, golden = guided_model(name)
    sde = sit_golden.load_config(name)["sde"]
    scheduler = FlowMatchSDEScheduler(last_step_size=sde["last_step_size"], start_time=sde["t0"])
    scheduler.set_timesteps(sde["num_steps"])
    assert len(scheduler.timesteps) == sde["num_steps"] == len(golden["sde_trajectory"])
    x = golden["cfg_x"]
    for i, timestep in enumerate(scheduler.timesteps):
        noise = golden["sde_noise"][i] if i < len(golden["sde_noise"]) else None
        x = scheduler.step(predict(x, timestep), timestep, x, variance_noise=noise).prev_sample
        torch.testing.assert_close(x, golden["sde_trajectory"][i], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sit_golden.available_sets())
def test_uniform_euler_matches_the_release_and_heun_its_accurate_solvers(name):
    predict, golden = guided_model(name)
    trajectory = golden["ode_euler_trajectory"]
    num_steps = len(trajectory) - 1
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist())
    x = golden["cfg_x"]
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(predict(x, timestep), timestep, x).prev_sample
        torch.testing.assert_close(x, trajectory[i + 1], rtol=0, atol=1e-4)

    scheduler = FlowMatchHeunDiscreteScheduler.from_config(FlowMatchSDEScheduler().config)
    scheduler.set_timesteps(100)
    x = golden["cfg_x"]
    for timestep in scheduler.timesteps:
        x = scheduler.step(predict(x, timestep), timestep, x).prev_sample
    # Heun's default grid ends at sigma 0.001. Worst seen: 0.0009.
    torch.testing.assert_close(x, golden["ode_dopri5_trajectory"][-1], rtol=0, atol=2e-3)


def test_time_grid():
    scheduler = FlowMatchSDEScheduler()
    scheduler.set_timesteps(250)
    times = 1 - scheduler.timesteps.double() / 1000
    assert len(times) == 250
    torch.testing.assert_close(times[[0, -1]], torch.tensor([1e-3, 0.96], dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(times.diff(), torch.full((249,), 0.959 / 249, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(scheduler.sigmas[:-1] * 1000, scheduler.timesteps, rtol=0, atol=1e-3)
    assert scheduler.sigmas[-1] == 0

    scheduler = FlowMatchSDEScheduler(last_step=None)
    scheduler.set_timesteps(4)
    expected = 1 - np.linspace(1e-3, 1 - 1e-3, 5)
    np.testing.assert_allclose(scheduler.sigmas.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_data_that_is_a_gaussian_is_sampled_exactly(form, last_step):
    """Data N(m, s^2): the velocity is known in closed form, and the samples must have that mean and deviation."""
    m, s = 1.5, 0.5

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        variance = (t * s) ** 2 + (1 - t) ** 2
        x1 = m + t * s**2 / variance * (x - t * m)
        x0 = (1 - t) / variance * (x - t * m)
        return x1 - x0

    # "mean" takes no noise in the last step, which narrows the samples by its size: keep it small.
    scheduler = FlowMatchSDEScheduler(diffusion_form=form, last_step=last_step, last_step_size=0.002)
    scheduler.set_timesteps(400)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, generator=generator)
    for timestep in scheduler.timesteps:
        t = 1 - timestep.item() / 1000
        x = scheduler.step(-velocity(x, t), timestep, x, generator=generator).prev_sample
    # Four standard errors of the mean (0.014) and of the deviation (0.010), and the step error.
    assert x.mean().item() == pytest.approx(m, abs=0.02)
    assert x.std().item() == pytest.approx(s, abs=0.02)


def test_diffusion_forms_at_known_times():
    expected = {
        "sbdm": [3.0, 1.0, 1 / 3],
        "constant": [1.0, 1.0, 1.0],
        "sigma": [0.75, 0.5, 0.25],
        "linear": [0.75, 0.5, 0.25],
        "decreasing": [0.25 * (math.sqrt(0.5) + 1) ** 2, 0.25, 0.25 * (1 - math.sqrt(0.5)) ** 2],
        "increasing-decreasing": [0.5, 1.0, 0.5],
    }
    assert set(expected) == set(DIFFUSION_FORMS)
    for form, values in expected.items():
        assert [diffusion_coefficient(t, form) for t in (0.25, 0.5, 0.75)] == pytest.approx(values)
    assert diffusion_coefficient(0.5, "sbdm", norm=3.0) == 3.0
    with pytest.raises(ValueError, match="'ito'"):
        diffusion_coefficient(0.5, "ito")


def test_last_steps_by_their_formulas():
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    t, dt = 0.96, 0.04
    s = score(x, v, t)
    expected = {
        "mean": x + (v + (1 - t) / t * s) * dt,
        "euler": x + v * dt,
        "tweedie": x / t + (1 - t) ** 2 / t * s,
    }
    for last_step, value in expected.items():
        scheduler = FlowMatchSDEScheduler(last_step=last_step)
        scheduler.set_timesteps(2)
        scheduler.set_begin_index(1)
        state = torch.get_rng_state()
        result = scheduler.step(-v, scheduler.timesteps[1], x).prev_sample
        torch.testing.assert_close(result, value, rtol=0, atol=1e-5)
        assert torch.equal(torch.get_rng_state(), state)
    # Where score and velocity belong together, Tweedie's formula is the flow's straight line to the data.
    torch.testing.assert_close(expected["tweedie"], expected["euler"], rtol=0, atol=1e-5)


def test_generators_make_the_noise_of_each_sample_its_own():
    scheduler = FlowMatchSDEScheduler()

    def run(batch: slice, seeds: list[int]) -> torch.Tensor:
        x = torch.arange(3.0).reshape(3, 1, 1).expand(3, 4, 5)[batch]
        scheduler.set_timesteps(5)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for timestep in scheduler.timesteps:
            x = scheduler.step(0.1 * x, timestep, x, generator=generators).prev_sample
        return x

    together = run(slice(None), [7, 8, 9])
    for i in range(3):
        torch.testing.assert_close(run(slice(i, i + 1), [7 + i])[0], together[i], rtol=0, atol=0)
    assert not torch.equal(run(slice(0, 1), [1]), together[:1])


def test_dtype_follows_the_model_and_the_sum_is_made_in_float32():
    scheduler = FlowMatchSDEScheduler()
    x, output = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for dtype in (torch.float32, torch.bfloat16):
        scheduler.set_timesteps(3)
        noise = torch.zeros_like(x)
        result = scheduler.step(output.to(dtype), scheduler.timesteps[0], x, variance_noise=noise, return_dict=False)
        assert result[0].dtype == dtype


def test_custom_sigmas():
    scheduler = FlowMatchSDEScheduler()
    sigmas = [0.9, 0.5, 0.1]
    scheduler.set_timesteps(sigmas=sigmas)
    assert scheduler.num_inference_steps == 3
    np.testing.assert_allclose(scheduler.timesteps.numpy(), [900, 500, 100], rtol=1e-6)
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [0.9, 0.5, 0.1, 0], rtol=1e-6)
    for bad in ([], [1.0, 0.5], [0.5, 0.9], [0.5, 0.0], [0.5, 0.5]):
        with pytest.raises(ValueError, match=r"decrease strictly inside \(0, 1\)"):
            scheduler.set_timesteps(sigmas=bad)
    with pytest.raises(ValueError, match="must be the number of sigmas, 3, got 2"):
        scheduler.set_timesteps(2, sigmas=sigmas)


def test_add_noise_is_the_linear_path():
    scheduler = FlowMatchSDEScheduler()
    data, noise = torch.ones(3, 2, 2), torch.full((3, 2, 2), 5.0)
    noised = scheduler.add_noise(data, noise, torch.tensor([0.0, 250.0, 1000.0]))
    torch.testing.assert_close(noised[:, 0, 0], torch.tensor([1.0, 2.0, 5.0]))
    torch.testing.assert_close(scheduler.scale_noise(data, 250.0, noise), torch.full((3, 2, 2), 2.0))
    assert scheduler.scale_model_input(data, 250.0) is data
    assert scheduler.init_noise_sigma == 1
    assert len(scheduler) == 1000


def test_steps_are_counted():
    scheduler, x = FlowMatchSDEScheduler(), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="must be set by set_timesteps before step"):
        scheduler.step(x, 500.0, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"must be one of scheduler\.timesteps, got 3"):
        scheduler.step(x, 3.0, x)
    assert scheduler.step_index is None
    for i, timestep in enumerate(scheduler.timesteps):
        scheduler.step(x, timestep, x)
        assert scheduler.step_index == i + 1
    with pytest.raises(ValueError, match="at most 2 times after set_timesteps"):
        scheduler.step(x, scheduler.timesteps[-1], x)
    # Begin in the middle: by its timestep, or by its index.
    for by_index in (False, True):
        scheduler.set_timesteps(4)
        if by_index:
            scheduler.set_begin_index(2)
        scheduler.step(x, scheduler.timesteps[2], x)
        assert scheduler.step_index == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"diffusion_form": "SBDM"}, "'sbdm'.*'SBDM'"),
        ({"last_step": "heun"}, "'tweedie'.*'heun'"),
        ({"last_step_size": 0.0}, r"last_step_size must be in \(0, 1\), got 0"),
        ({"start_time": 0.0}, "start_time .* got 0"),
        ({"start_time": 0.97}, "start_time .* got 0.97"),
        ({"diffusion_norm": -1.0}, "diffusion_norm must be a number from 0.0 to .*, got -1"),
        ({"prediction_type": "epsilon"}, "got 'epsilon'"),
        ({"use_flow_sigmas": False}, "got 'flow_prediction' and False"),
    ],
)
def test_config_errors(config, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchSDEScheduler(**config)


@pytest.mark.parametrize("num_steps", [0, -1, None])
def test_needs_at_least_one_step(num_steps):
    with pytest.raises(ValueError, match="num_inference_steps"):
        FlowMatchSDEScheduler().set_timesteps(num_steps)


def test_one_step_goes_from_noise_to_data():
    scheduler = FlowMatchSDEScheduler(last_step="euler")
    scheduler.set_timesteps(1)
    noise, data = torch.zeros(1, 3), torch.ones(1, 3)
    result = scheduler.step(noise - data, scheduler.timesteps[0], noise).prev_sample
    torch.testing.assert_close(result, data, rtol=0, atol=2e-3)


def test_save_and_load(tmp_path):
    scheduler = FlowMatchSDEScheduler(diffusion_form="sigma", last_step=None, start_time=0.01)
    scheduler.save_pretrained(tmp_path)
    loaded = FlowMatchSDEScheduler.from_pretrained(tmp_path)
    # As of every scheduler of diffusers, a loaded config does not say which values were defaults.
    saved = dict(scheduler.config)
    assert "diffusion_norm" in saved.pop("_use_default_values")
    assert loaded.config == saved
    again = FlowMatchSDEScheduler.from_config(loaded.config)
    assert again.config == saved


def test_compatibles_are_schedulers_that_sample_flow_models():
    scheduler = FlowMatchSDEScheduler()
    names = {cls.__name__ for cls in scheduler.compatibles}
    assert {"FlowMatchSDEScheduler", "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"} <= names
    for cls in scheduler.compatibles:
        swapped = cls.from_config(scheduler.config)
        assert swapped.config.num_train_timesteps == 1000
        back = FlowMatchSDEScheduler.from_config(swapped.config).config
        assert {name: back[name] for name in scheduler.config} == dict(scheduler.config), cls


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers with NumPy 2
@pytest.mark.parametrize("other", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, *MULTISTEP])
def test_swaps_with_the_flow_schedulers_of_diffusers(other):
    """x_0 and x_1 on a straight line: every solver must walk it, in both directions of the swap."""
    swapped = other.from_config(FlowMatchSDEScheduler(num_train_timesteps=1000).config)
    swapped.set_timesteps(10)
    noise, data = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.full((2, 3, 4), 2.0)
    x = noise
    for timestep in swapped.timesteps:
        x = swapped.step(noise - data, timestep, x, return_dict=False)[0]
    # DEIS may repeat its last sigma instead of ending at 0: it stays on the line, but stops early.
    end = swapped.sigmas[-1].item()
    assert end == 0 or other is DEISMultistepScheduler
    # Worst seen: 0.0043 (DPM-Solver++ and DEIS, which begin at 0.999 with the sample given for 1).
    torch.testing.assert_close(x, end * noise + (1 - end) * data, rtol=0, atol=5e-3)

    back = FlowMatchSDEScheduler.from_config(swapped.config)
    assert back.config.last_step == "mean"
    back.set_timesteps(3)
    assert len(back.timesteps) == 3


def test_a_scheduler_of_another_kind_of_model_is_refused():
    with pytest.raises(ValueError, match="got 'epsilon'"):
        FlowMatchSDEScheduler.from_config(DPMSolverMultistepScheduler(prediction_type="epsilon").config)
