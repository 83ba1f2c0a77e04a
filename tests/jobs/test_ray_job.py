"""Jobs as `ray job submit` runs them."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lib.model.folder import load_model
from tests.helpers.service import RaySession

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_ray_job_submit(ray_session: RaySession, shop_dataset, tmp_path):
    out, result = tmp_path / "model", tmp_path / "manifest.json"
    given = ["--set", "epochs=1", "--set", "hidden_size=16", "--set", "max_length=20"]
    job = [sys.executable, "-m", "jobs.pretrain", "--data", shop_dataset, "--out", out, "--json", result, *given]
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", ray_session.address]
    done = subprocess.run(
        [*command, "--working-dir", ".", "--", *map(str, job)],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch 1/2  loss" in done.stdout  # the second is with what was kept back for the ranker
    assert "succeeded" in done.stdout
    assert json.loads(result.read_text()) == json.loads((out / "manifest.json").read_text())
    load_model(out)


def test_a_job_does_not_upload_what_is_not_source(tmp_path, ray_session):
    """`ray job submit --working-dir .` honours .gitignore and leaves .git and .venv out by itself."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    for name in (".git/objects/pack", ".venv/lib.py", "data/films/events.parquet", "models/films/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("large")
    (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    (tmp_path / "jobs.py").write_text("small")
    package = tmp_path.parent / "package.zip"
    create_package(
        str(tmp_path), package, include_gitignore=True, excludes=get_runtime_env_default_excludes(), logger=None
    )
    assert sorted(zipfile.ZipFile(package).namelist()) == [".gitignore", "jobs.py"]
