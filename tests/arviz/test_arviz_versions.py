"""Both ArviZ agree: 1.x, which needs Python 3.12, in an environment of its own without torch."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import arviz
import numpy as np
import pytest
import torch
from problems import bert, mlp, tokens

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.arviz import as_chains, groups, summary, to_inference_data
from pyrolora.diagnostics import loo
from pyrolora.diagnostics.psis import psis_khat

PACKAGE = Path(pyrolora.__file__).parent
WEIGHTS = -1.5 * np.log1p(-np.linspace(0, 0.999, 400))
"""Logarithms of the quantiles of a Pareto distribution of index 1 / 1.5."""
SCRIPT = """
import json, pickle, sys, types, warnings
from pathlib import Path
package, folder = map(Path, sys.argv[1:])
sys.path.insert(0, str(package.parent))
for part in ("arviz", "diagnostics"):  # whose own imports need torch
    module = types.ModuleType(f"pyrolora.{part}")
    module.__path__ = [str(package / part)]
    sys.modules[f"pyrolora.{part}"] = module

import matplotlib
matplotlib.use("agg")
import arviz as az, numpy as np
from pyrolora.errors import ConfigError
from pyrolora.arviz.containers import summary, to_inference_data
from pyrolora.diagnostics.leave_one_out import loo
from pyrolora.diagnostics.psis import psis_khat
from pyrolora.arviz.chains import as_chains

assert int(az.__version__.split(".")[0]) >= 1, az.__version__
warnings.simplefilter("error")
for advice in ("Estimated shape parameter", "Variables y in", "Found chain dimension"):
    warnings.filterwarnings("ignore", advice)
found = {"khat": psis_khat(np.load(folder / "weights.npy"))}
with open(folder / "fits.pickle", "rb") as file:
    fits = pickle.load(file)
for name, calls in fits.items():
    first, second = trees = [to_inference_data(*call) for call in calls]
    posterior = first["posterior"]
    assert posterior["adapter_norm"].dims == ("chain", "draw", "layer")
    assert posterior["mixture_weights"].dims == ("chain", "draw", "block", "component")
    assert [f"{layer}.A" for layer in posterior["layer"].values] == list(posterior["block"].values)
    for group in ("posterior", "posterior_predictive", "observed_data", "log_likelihood"):
        assert first[group].attrs["guide"] == "montec", group
    table, elpd = summary(first), az.loo(first).elpd
    found[name] = {
        "mean": table["mean"].to_dict(), "sd": table["sd"].to_dict(), "elpd": float(elpd),
    }
    cold = loo(first)
    found[name]["cold"] = [float(cold[part]) for part in ("elpd", "se", "p")]
    found[name]["khat"] = float(cold.pareto_k.max())
    assert float(cold.elpd_i.sum()) == cold.elpd
    assert set(az.compare({"a": cold, "b": loo(second)}).index) == {"a", "b"}
    assert set(az.compare({"first": first, "second": second}).index) == {"first", "second"}
    for plot in ("plot_forest", "plot_trace", "plot_trace_dist"):
        getattr(az, plot)(first, var_names=["adapter_norm"])
    az.plot_ppc_dist(first, var_names=["y"], num_samples=20)
    if name == "classification":
        az.plot_ppc_pava(first, var_names=["y"])
        assert list(first["posterior_predictive"]["class"].values) == ["bad", "good"]
    both = as_chains(trees)
    assert both["posterior"].sizes["chain"] == 2
    assert both["posterior"].attrs["guide"] == "montec"
    np.testing.assert_array_equal(
        both["log_likelihood"]["y"].sel(chain=1), second["log_likelihood"]["y"].sel(chain=0)
    )
    found[name]["r_hat"] = summary(both)["r_hat"].to_dict()
    try:
        as_chains([first, first])
    except ConfigError as error:
        assert "the very draws of fit 0" in str(error)
    else:
        raise AssertionError("the same draws twice")
    both.to_netcdf(folder / f"{name}.nc")
    again = az.from_netcdf(folder / f"{name}.nc")
    assert again["log_likelihood"]["y"].equals(both["log_likelihood"]["y"])
print(json.dumps(found))
"""


def modern_python() -> str | None:
    if sys.version_info >= (3, 12):
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    installed = sorted(map(str, pyenv.glob("versions/3.1[2-9].*/bin/python")))
    for name in ("python3.14", "python3.13", "python3.12", *installed):
        found = shutil.which(name)
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    return None


def groups_of_fits(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple]]:
    """Return the arguments of the conversion for two fits each of classification and regression."""
    calls: list[tuple] = []
    monkeypatch.setattr(groups, "to_inference_data", lambda *call: calls.append(call))
    names = {0: "bad", 1: "good"}
    x = torch.randn(20, 4)
    problems = {
        "classification": (
            lambda: bert(initializer_range=0.3, id2label=names, label2id={"bad": 0, "good": 1}),
            tokens(20),
            "classification",
        ),
        "regression": (lambda: mlp(4, 1), (x, x[:, 0]), "regression"),
    }
    for network, data, task in problems.values():
        for seed in (0, 1):
            pyrolora.fit(
                network(), data, task=task, adapter=AdapterConfig(r=1), epochs=2,
                learning_rate=0.02, seed=seed,
            ).to_arviz(50, data=data, log_likelihood=True, seed=seed)  # fmt: skip
    return {name: calls[2 * i : 2 * i + 2] for i, name in enumerate(problems)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
@pytest.mark.skipif(modern_python() is None, reason="ArviZ 1.x needs Python 3.12 or newer")
def test_arviz_1_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, chains, summary, leave-one-out, k̂ and plots of real fits."""
    python = modern_python()
    assert python is not None
    fits = groups_of_fits(monkeypatch)
    (tmp_path / "fits.pickle").write_bytes(pickle.dumps(fits))
    np.save(tmp_path / "weights.npy", WEIGHTS)
    (tmp_path / "script.py").write_text(SCRIPT)

    subprocess.run([python, "-m", "venv", str(tmp_path / "venv")], check=True)
    own = str(tmp_path / "venv" / "bin" / "python")
    needs = ["arviz>=1,<2", "h5netcdf", "h5py", "matplotlib"]
    subprocess.run([own, "-m", "pip", "install", "--quiet", *needs], check=True)
    done = subprocess.run(
        [own, str(tmp_path / "script.py"), str(PACKAGE), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("khat") == pytest.approx(psis_khat(WEIGHTS), abs=1e-6)
    for name, calls in fits.items():
        trees = [to_inference_data(*call) for call in calls]
        table = summary(trees[0])
        for column in ("mean", "sd"):
            assert found[name][column] == pytest.approx(table[column].to_dict(), rel=1e-4)
        assert found[name]["elpd"] == pytest.approx(arviz.loo(trees[0]).elpd_loo, abs=1e-3)
        cold = loo(trees[0])
        parts = [cold[part] for part in ("elpd_loo", "se", "p_loo")]
        assert found[name]["cold"] == pytest.approx(parts, abs=1e-3)
        assert found[name]["khat"] == pytest.approx(float(cold.pareto_k.max()), abs=1e-2)
        r_hat = summary(as_chains(trees))["r_hat"].to_dict()
        assert found[name]["r_hat"] == pytest.approx(r_hat, rel=1e-3)


def test_the_vector_that_both_arviz_judge_has_a_known_tail() -> None:
    """w = u^{−3/2} of uniform u: k = 1.5."""
    assert psis_khat(WEIGHTS) == pytest.approx(1.5, abs=0.2)
