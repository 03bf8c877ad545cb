"""The conversion under ArviZ 1.x, which needs Python 3.12: in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2]
SCRIPT = """
import sys
sys.path.insert(0, {package!r})
import arviz as az, numpy as np
from pyrolora.report.arviz import to_inference_data
assert int(az.__version__.split(".")[0]) >= 1, az.__version__
rng = np.random.default_rng(0)
tree = to_inference_data(
    {{
        "posterior": {{
            "adapter_norm": (rng.normal(size=(1, 50, 3)), ("layer",)),
            "covariance": (rng.normal(size=(1, 50, 3, 2, 2)), ("block", "rank", "rank_")),
        }},
        "posterior_predictive": {{
            "y": (rng.dirichlet(np.ones(2), size=(1, 50, 9)), ("example", "class"))
        }},
        "observed_data": {{"y": (rng.integers(0, 2, 9), ("example",))}},
        "log_likelihood": {{"y": (np.log(rng.uniform(0.5, 1, (1, 50, 9))), ("example",))}},
    }},
    {{"layer": ["a", "b", "c"], "block": ["a.A", "b.A", "c.A"]}},
    {{"guide": "montec"}},
)
assert tree["posterior"]["adapter_norm"].dims == ("chain", "draw", "layer")
assert list(tree["posterior"]["block"].values) == ["a.A", "b.A", "c.A"]
assert tree["posterior_predictive"]["y"].dims == ("chain", "draw", "example", "class")
assert tree["posterior"].attrs["guide"] == "montec"
assert len(az.summary(tree, var_names=["adapter_norm"])) == 3
assert np.isfinite(az.loo(tree).elpd)
tree.to_netcdf({out!r})
assert az.from_netcdf({out!r})["log_likelihood"]["y"].shape == (1, 50, 9)
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


@pytest.mark.slow
@pytest.mark.skipif(modern_python() is None, reason="ArviZ 1.x needs Python 3.12 or newer")
def test_conversion_under_arviz_1(tmp_path: Path) -> None:
    python = modern_python()
    assert python is not None
    subprocess.run([python, "-m", "venv", str(tmp_path / "venv")], check=True)
    own = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run(
        [own, "-m", "pip", "install", "--quiet", "arviz>=1,<2", "h5netcdf", "h5py"], check=True
    )
    script = textwrap.dedent(SCRIPT).format(package=str(PACKAGE), out=str(tmp_path / "x.nc"))
    done = subprocess.run([own, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
