"""Files from strangers and failing disks: clear errors, no code run, no memory taken, no way out.

Every loader is fed files that are almost right.
"""

import io
import json
import os
import pickle
import resource
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from wm import WMError
from wm.config import from_yaml, to_yaml
from wm.data import Latents
from wm.episodes import Episode, Shard, write_shard
from wm.evaluate import read_returns
from wm.files import inside
from wm.server import RunRecord
from wm.stages import DONE, read_manifest
from wm.sync import sync
from wm.tracking import read_metrics
from wm.training import PARTS, SafeCheckpointIO
from wm.worldmodels.agent import Agent, AgentConfig, load_tensors
from wm.worldmodels.pipeline import Config

EXAMPLES = 300  # of each format: thousands in all
MEMORY = 2**30  # bytes that a loader may take
NASTY = [
    b"",
    b"-1",
    b"9" * 5000,
    b"1e999",
    b"NaN",
    b"null",
    b"[" * 20_000,
    b"{" * 100,
    b'"../../../etc/passwd"',
    b"&a [*a, *a]",
    b"!!python/object/apply:pathlib.Path.touch [ran]",
    b"${oc.env:HOME}",
    b"\xff\xfe\x00",
    b"\n",
    b": ",
]


@st.composite
def damaged(draw, whole):
    """A file with some bytes of it replaced, removed or added, or cut."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at, size = draw(st.integers(0, len(data))), draw(st.integers(0, 8))
        data[at : at + size] = draw(st.binary(max_size=8) | st.sampled_from(NASTY))
    return bytes(data[: draw(st.none() | st.integers(0, len(data)))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One sound file of every format that is read."""
    folder = tmp_path_factory.mktemp("sound")
    frames = np.zeros((3, 64, 64, 3), np.uint8)
    steps = (np.zeros((2, 1), np.float32), np.ones(2, np.float32))
    write_shard(folder / "shard-0000000000", [Episode(0, frames, *steps, True, False)])
    (folder / "latents").mkdir()
    for name in ("mean", "log_variance"):
        np.save(folder / "latents" / f"{name}.npy", np.zeros((3, 2), np.float32))
    (folder / "file").write_text("made")
    manifest = {
        **{"stage": "tiny", "fingerprint": "f" * 64, "config": {}, "inputs": {}, "seconds": 1.0},
        **{"busy_seconds": 0.5, "facts": {"eval/mean": 1.0}, "versions": {}, "run_id": None},
        "files": {"file": {"bytes": 4, "sha256": "0" * 64}},
    }
    (folder / DONE).write_text(json.dumps(manifest))
    record = RunRecord("tiny", "vision-0", {"a": "b"}, {}, {"seed": 0}, artifacts=[["file", None]])
    (folder / ".run.json").write_text(json.dumps(asdict(record)))
    (folder / "metrics.jsonl").write_text('\n{"step": 0, "loss": 1.5}\n{"step": 1, "loss": NaN}')
    (folder / "episodes.csv").write_text("seed,return,steps,terminated\n1,2.5,3,1\n")
    (folder / "config.yaml").write_text(to_yaml(AgentConfig()))
    (folder / "tensors.safetensors").write_bytes(save({"a": torch.ones(2), "b": torch.ones(1, 3)}))
    checkpoint = {part: {} for part in PARTS} | {"state_dict": {"weight": torch.ones(3)}}
    SafeCheckpointIO().save_checkpoint(checkpoint, folder / "step=1.ckpt")
    return folder


SHARD = "shard-0000000000"
LOADERS = {
    f"{SHARD}/index.json": lambda folder: Shard(folder / SHARD),
    f"{SHARD}/frames.npy": lambda folder: Shard(folder / SHARD),
    f"{SHARD}/actions.npy": lambda folder: Shard(folder / SHARD),
    f"{SHARD}/rewards.npy": lambda folder: Shard(folder / SHARD),
    "latents/mean.npy": lambda folder: Latents(folder / "latents"),
    DONE: read_manifest,
    ".run.json": RunRecord.load,
    "metrics.jsonl": read_metrics,
    "episodes.csv": lambda folder: read_returns(folder / "episodes.csv"),
    "config.yaml": lambda folder: from_yaml(AgentConfig, folder / "config.yaml"),
    "tensors.safetensors": lambda folder: load_tensors(folder / "tensors.safetensors", "ab"),
    "step=1.ckpt": lambda folder: SafeCheckpointIO().load_checkpoint(folder / "step=1.ckpt"),
}


@pytest.fixture
def little_memory():
    """A loader that asks for a gigabyte fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("name", LOADERS)
def test_a_damaged_file_is_read_or_refused_with_a_clear_error(name, folder, little_memory):
    path, load = folder / name, LOADERS[name]
    whole = path.read_bytes()
    load(folder)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(whole[:4000]))
    def feed(data):
        path.write_bytes(data + whole[4000:])
        started = time.process_time()
        try:
            load(folder)
        except WMError as error:
            assert len(str(error)) < 2000
        assert time.process_time() - started < 5

    try:
        feed()
    finally:
        path.write_bytes(whole)
    assert not (Path.cwd() / "ran").exists()


HEADERS = {
    "petabytes": {"descr": "|u1", "fortran_order": False, "shape": (2**50, 64, 64, 3)},
    "more than can be counted": {"descr": "|u1", "fortran_order": False, "shape": (2**70, 64)},
    "objects": {"descr": "|O", "fortran_order": False, "shape": (4, 64, 64, 3)},
}


@pytest.mark.parametrize("name", ["frames", "actions", "rewards"])
@pytest.mark.parametrize("header", HEADERS)
def test_an_array_that_claims_what_it_has_not_takes_no_memory(name, header, folder, little_memory):
    path = folder / SHARD / f"{name}.npy"
    whole, claim = path.read_bytes(), io.BytesIO()
    np.lib.format.write_array_header_1_0(claim, HEADERS[header])
    path.write_bytes(claim.getvalue() + b"\0" * 100)
    try:
        with pytest.raises(WMError, match=rf"{SHARD} is damaged.*--repair"):
            Shard(folder / SHARD)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        "scale: !!python/object/apply:pathlib.Path.touch [ran]\n",
        "scale: ${oc.env:HOME}\n",
        "scale: " + "[" * 100,
        "x" * 2**21,
    ],
    ids=["references", "an object", "the environment", "nested", "long"],
)
def test_a_configuration_holds_values_and_nothing_else(text, tmp_path, own_folder):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(WMError, match=r"cannot read .*config\.yaml: it (holds|is)"):
        from_yaml(Config, path)
    assert os.listdir(own_folder) == []


class Payload:
    """A pickle that touches a file when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_checkpoint_with_code_in_it_is_refused_and_runs_none(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "step=1.ckpt"
    SafeCheckpointIO().save_checkpoint(
        {part: {} for part in PARTS} | {"callbacks": Payload(marker)}, path
    )
    with pytest.raises(WMError, match=r"step=1\.ckpt is no checkpoint .*delete it"):
        SafeCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it would have
    assert marker.exists()


def test_arrays_with_pickles_in_them_are_refused_and_run_none(folder, tmp_path):
    path, marker = folder / SHARD / "actions.npy", tmp_path / "ran"
    whole = path.read_bytes()
    np.save(path, np.array([Payload(marker)], object), allow_pickle=True)
    try:
        with pytest.raises(WMError, match="damaged"):
            Shard(folder / SHARD)
        path.write_bytes(pickle.dumps(Payload(marker)))
        with pytest.raises(WMError, match="damaged"):
            Shard(folder / SHARD)
    finally:
        path.write_bytes(whole)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["../file", "/etc/passwd", "a/../../file", "link", "a\0b", "..", "l" * 5000]
)
def test_no_name_in_a_manifest_leads_out_of_its_folder(name, tmp_path):
    here = tmp_path / "stage"
    here.mkdir()
    (tmp_path / "file").write_text("secret")
    (here / "link").symlink_to(tmp_path / "file")
    with pytest.raises(WMError, match="leads out of it"):
        inside(here, name)
    assert inside(here, "deep/file") == here / "deep" / "file"


def test_a_record_that_names_a_file_elsewhere_sends_nothing(tmp_path, capsys):
    folder = tmp_path / "runs" / "tiny" / "vision-0-abc"
    folder.mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    record = RunRecord(
        "tiny", "vision-0", {"a": "b"}, {}, {}, artifacts=[["../../../secret", None]]
    )
    record.save(folder)
    sync(tmp_path / "runs")
    assert "leads out of it" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("secret"))


@pytest.mark.parametrize(
    ("experiment", "artifacts"), [("../../out", []), ("tiny", [["agent", None]])]
)
def test_a_record_whose_experiment_or_link_leads_elsewhere_sends_nothing(
    experiment, artifacts, tmp_path, capsys
):
    folder, secret = tmp_path / "runs" / "tiny" / "vision-0-abc", tmp_path / "secret"
    (folder / "agent").mkdir(parents=True)
    secret.write_text("secret")
    (folder / "agent" / "weights").symlink_to(secret)
    RunRecord(experiment, "vision-0", {}, {}, {}, artifacts=artifacts).save(folder)
    sync(tmp_path / "runs")
    assert "leads out of it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "runs" / "artifacts").rglob("weights"))


def test_measurements_that_are_a_link_are_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/zero")
    with pytest.raises(WMError, match="leads out of it"):
        read_metrics(tmp_path)


def test_an_agent_that_is_a_link_to_other_files_is_refused(tmp_path):
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "config.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    (tmp_path / "elsewhere.yaml").write_text(to_yaml(AgentConfig()))
    with pytest.raises(WMError, match="leads out of it"):
        Agent.load(tmp_path / "agent")


@pytest.mark.parametrize(
    "sizes",
    [("memory", "hidden", 10**9), ("vision", "latent", 10**12), ("controller", "hidden", 10**9)],
    ids=str,
)
def test_a_configuration_alone_takes_no_memory(sizes, tmp_path, little_memory):
    """Its models are made only if the files hold their weights."""
    part, field, size = sizes
    config = AgentConfig()
    config = replace(config, **{part: replace(getattr(config, part), **{field: size})})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    for name in ("vision", "memory", "controller", "starts"):
        (tmp_path / f"{name}.safetensors").write_bytes(save({"weights": torch.ones(1)}))
    with pytest.raises(WMError, match="does not fit"):
        Agent.load(tmp_path)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    path = tmp_path / "controller.safetensors"
    path.write_bytes(save({"weights": torch.tensor([1.0, torch.nan])}))
    with pytest.raises(WMError, match="weights is not finite"):
        load_tensors(path, ["weights"])
