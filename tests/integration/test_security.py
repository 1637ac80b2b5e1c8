"""Security: what an untrusted model, data set, recipe or checkpoint cannot make raydiv do."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.small_run import recipe_of, write_wide
from helpers.sources import imports, modules
from raydiv.cli import main
from raydiv.commands.prepare import prepare
from raydiv.commands.train import train
from raydiv.config import load_recipe, save_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.config.data import DataConfig
from raydiv.config.recipe import BatchConfig
from raydiv.config.source import Source
from raydiv.data import readers
from raydiv.data.index import OpenSource
from raydiv.data.readers import iterate_records
from raydiv.data.sources import files_of
from raydiv.data.tokenize import record_chunks
from raydiv.evaluation.baseline_cache import Measurement
from raydiv.experiments.shared import RunGroup
from raydiv.model.chat import Chat
from raydiv.model.load import ModelSource
from raydiv.model.resolve import model_directory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runs.tracker import MlflowTracker, forwarded_uri
from raydiv.runtime.session import ray_session, require_dashboard
from raydiv.training.checkpoint.manifest import MANIFEST, CheckpointStore, Manifest
from raydiv.training.checkpoint.shards import CheckpointShard
from raydiv.utils.cache import shared_dir
from raydiv.utils.errors import UserError
from raydiv.utils.storage import Folder

# ---- raydiv's own sources

CODE_IN_DATA = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")

ARCHIVES = ("zipfile", "tarfile", "gzip", "lzma", "bz2")
"""raydiv extracts none: archives are read by the libraries that fetch them (datasets, huggingface_hub, transformers).
"""

SERVERS = ("socket", "socketserver", "http", "asyncio", "uvicorn", "flask", "fastapi", "aiohttp")

# rows between raydiv's own processes, which Ray would pickle as well, and never a file; a job's log, which Ray's client
# sends asynchronously, and that client's errors; concurrent requests to the server that the user names
ALLOWED = {
    ("runtime.actor_pool", "pickle"),
    ("runtime.submit.jobs", "asyncio"),
    ("runtime.submit.jobs", "aiohttp"),
    ("evaluation.server", "asyncio"),
}

CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "np.load", "numpy.load"}
CALLS |= {f"yaml.{name}" for name in ("load", "full_load", "unsafe_load", "load_all", "unsafe_load_all")}
METHODS = {"extractall", "unpack_archive", "load_module"}
ARGUMENTS = {"shell", "allow_pickle"}


def dangerous(tree: ast.AST) -> Iterator[str]:
    """Calls that run code from files or strings."""
    enabled: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            enabled |= {
                key for key, value in pairs if key and isinstance(value, ast.Constant) and value.value == "token"
            }
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in CALLS or name.rpartition(".")[2] in METHODS:
                yield f"{name}, line {node.lineno}"
            yield from (f"{name}({key}=...), line {node.lineno}" for key in ARGUMENTS & keywords.keys())
            loader = name.rpartition(".")[0].rpartition(".")[2]
            unpacked = ast.unparse(keywords[None]) if None in keywords else ""
            # for_model reads nothing, and the dictionary `gguf_source` is of a bundled GGUF file
            if loader.startswith("Auto") and not name.endswith(".for_model") and unpacked != "gguf_source":
                if "trust_remote_code" not in keywords and unpacked != "trusted":
                    yield f"{name} without trust_remote_code, line {node.lineno}: transformers asks on the terminal"
                if name.endswith(".from_pretrained") and "Model" in loader and "use_safetensors" not in keywords:
                    yield f"{name} without use_safetensors, line {node.lineno}"
        elif isinstance(node, ast.Constant) and node.value == "RAY_AUTH_MODE" and node not in enabled:
            yield f"RAY_AUTH_MODE is set, line {node.lineno}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_module_runs_what_it_reads_extracts_archives_or_listens(module: str) -> None:
    path = modules()[module]
    used = {name.partition(".")[0] for name in imports(path)} & {*CODE_IN_DATA, *ARCHIVES, *SERVERS}
    assert {(module, library) for library in used} <= ALLOWED
    assert list(dangerous(ast.parse(path.read_text()))) == []


def test_dangerous_calls_are_found() -> None:
    bad = "eval(x); torch.load(f); yaml.load(f); subprocess.run(c, shell=True); tar.extractall(); np.load(f)\n"
    bad += "AutoConfig.from_pretrained(d); AutoModel.from_pretrained(d, trust_remote_code=False)\n"
    bad += "os.environ['RAY_AUTH_MODE'] = 'disabled'\n"
    bad += "yaml.safe_load(f); model.eval(); AutoModel.from_pretrained(**gguf_source)"
    assert len(list(dangerous(ast.parse(bad)))) == 9


# ---- models


def marker(folder: Path) -> Path:
    """The file that a model's code writes when it runs."""
    return folder / "ran"


def with_code(model: Path, folder: Path, kind: str) -> Path:
    """A copy of ``model`` with a config, or a tokenizer, of a class in its own Python file."""
    directory = Path(shutil.copytree(model, folder / f"own-{kind}"))
    file, entries, classes = {
        "config": (
            "config.json",
            {
                "model_type": "own",
                "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
            },
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class OwnConfig(LlamaConfig): model_type = 'own'\n"
            "class OwnModel(LlamaForCausalLM): config_class = OwnConfig\n",
        ),
        "tokenizer": (
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}},
            "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n",
        ),
    }[kind]
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    (directory / "own.py").write_text(f"open({str(marker(folder))!r}, 'w').close()\n{classes}")
    return directory


COMMANDS = {
    "plan": ["plan", "RECIPE"],
    "prepare": ["prepare", "RECIPE"],
    "train": ["train", "RECIPE"],
    "data check": ["data", "check", "DATA", "--recipe", "RECIPE"],
    "separation": ["separation", "MODEL"],
    "evaluate": ["evaluate", "MODEL"],
}


@pytest.fixture
def says_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question on the terminal is answered with yes, as by `yes | raydiv ...`."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


@pytest.fixture
def run(tmp_path: Path, files: dict[str, str], capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command on a model; returns its exit status and its standard error."""

    def run(command: str, model: Path, *more: str) -> tuple[int, str]:
        recipe = tmp_path / "recipe.yaml"
        save_recipe(recipe_of(model, files, tmp_path, "r", "cluster.num_workers=1", *more), recipe)
        paths = {"RECIPE": str(recipe), "MODEL": str(model), "DATA": files["train"]}
        status = main([paths.get(word, word) for word in COMMANDS[command]])
        return status, capfd.readouterr().err

    return run


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are refused before Ray is started."""
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.setattr("ray.is_initialized", lambda: False)


@pytest.mark.usefixtures("says_yes", "no_ray")
@pytest.mark.parametrize(
    ("kind", "command"),
    # data check reads only the tokenizer
    [
        (kind, command)
        for kind in ("config", "tokenizer")
        for command in COMMANDS
        if (kind, command) != ("config", "data check")
    ],
)
def test_a_models_own_code_is_not_run_by_default(
    kind: str, command: str, tiny_model: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    status, error = run(command, with_code(tiny_model, tmp_path, kind))
    assert status == 2, error
    assert "model.trust_remote_code: true" in error
    assert "Traceback" not in error
    assert not marker(tmp_path).exists()


@pytest.mark.parametrize("kind", ["config", "tokenizer"])
def test_a_models_own_code_is_run_with_trust_remote_code(
    kind: str, tiny_model: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    status, error = run("plan", with_code(tiny_model, tmp_path, kind), "model.trust_remote_code=true")
    assert status == 0, error
    assert marker(tmp_path).exists()


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def only_pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def index_to(name: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "other.safetensors")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def adapter(directory: Path) -> None:
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    (directory / "pytorch_model.bin").rename(directory / "adapter_model.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (only_pickle, r"\*\.safetensors is missing; pytorch_model\.bin is (?:a )?pickle.*save_pretrained"),
        (adapter, r"adapter_model\.safetensors is missing; adapter_model\.bin is (?:a )?pickle.*save_pretrained"),
        (index_to("pytorch_model.bin"), r"pytorch_model\.bin is missing"),
        (index_to("../elsewhere.safetensors"), r"\.\./elsewhere\.safetensors is missing"),
        (lambda directory: None, None),
    ],
)
@pytest.mark.usefixtures("no_ray")
def test_weights_in_pickle_are_never_read(
    change: Callable[[Path], None], message: str | None, tiny_model: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(marker(tmp_path))))
    change(directory)
    if message is None:  # beside safetensors
        ModelSource(model_directory(str(directory))).load()
    else:
        with pytest.raises(UserError, match=message):
            model_directory(str(directory))
        assert run("prepare", directory)[0] == 2
    assert not marker(tmp_path).exists()


# ---- YAML


@pytest.mark.parametrize("place", ["recipe", "extends", "override", "sweep", "study", "prompts", "columns"])
def test_yaml_constructs_no_objects(
    place: str, tmp_path: Path, tiny_model: Path, files: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    trap = f'!!python/object/apply:os.system ["touch {marker(tmp_path)}"]'
    recipe, base = tmp_path / "recipe.yaml", tmp_path / "base.yaml"
    save_recipe(recipe_of(tiny_model, files, tmp_path, "r"), base)
    recipe.write_text("extends: base.yaml\n")
    command = ["plan", str(recipe)]
    if place == "recipe":
        recipe.write_text(f"{recipe.read_text()}seed: {trap}\n")
    elif place == "extends":
        base.write_text(f"{base.read_text()}extends: {trap}\n")
    elif place in ("sweep", "study"):
        recipe.write_text(f"{recipe.read_text()}{place}: {{space: {trap}, models: {trap}}}\n")
        command[0] = place
    elif place == "override":
        command.append(f"seed={trap}")
    elif place == "prompts":
        command = ["separation", str(tiny_model), "--prompts", f"{{path: {trap}}}"]
    else:
        command = ["data", "check", f"{{path: x.jsonl, columns: {trap}}}"]
    assert main(command) == 2
    error = capfd.readouterr().err.strip()
    assert "YAML" in error
    assert "\n" not in error
    assert not marker(tmp_path).exists()


# ---- paths

OUTSIDE = ["../secret", "a/../../secret", "/etc/passwd", "~/secret", "s3://bucket/secret", "..", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = Folder(str(tmp_path / "folder"))
    folder.write("inside", b"x")
    (tmp_path / "folder" / "a").mkdir()
    actions: list[Callable[[], Any]] = [
        lambda: folder.uri_of(name),
        lambda: folder.subfolder(name),
        lambda: folder.has(name),
        lambda: folder.read(name),
        lambda: folder.write(name, b"y"),
        lambda: folder.remove_file(name),
        lambda: folder.local_file(name).__enter__(),
        lambda: folder.new_file(name).__enter__(),
        lambda: Measurement({}, {name: "y"}, []).write_into(tmp_path / "folder"),
    ]
    for action in actions:
        with pytest.raises(UserError, match="leads out of"):
            action()
    assert (tmp_path / "secret").read_text() == "x"


@pytest.mark.parametrize("name", ["../../weights.safetensors", "/tmp/weights.safetensors"])
def test_a_checkpoint_names_only_its_own_files(name: str, tmp_path: Path) -> None:
    checkpoints = CheckpointStore(Folder(str(tmp_path)))
    manifest = Manifest(4, 4, 1, {}, {}, None, [CheckpointShard(name, 1, "0" * 64, {})])
    checkpoints.at(4).write(MANIFEST, manifest.as_bytes())
    with pytest.raises(ValueError, match="leads out of"):
        checkpoints.manifest(4)


def test_a_checkpoint_is_of_its_own_step(tmp_path: Path) -> None:
    """The files of another step's manifest would be read unchecked."""
    checkpoints = CheckpointStore(Folder(str(tmp_path)))
    checkpoints.at(4).write(MANIFEST, Manifest(2, 2, 1, {}, {}, None, []).as_bytes())
    with pytest.raises(ValueError, match="that of step 2"):
        checkpoints.manifest(4)


@pytest.mark.parametrize("file", ["state.json", "dataset_dict.json"])
def test_a_saved_data_set_names_only_its_own_files(file: str, tmp_path: Path) -> None:
    saved, out = tmp_path / "saved", "../secret"
    saved.mkdir()
    (tmp_path / "secret").mkdir()
    content = {"state.json": {"_data_files": [{"filename": f"{out}.arrow"}]}, "dataset_dict.json": {"splits": [out]}}
    (saved / file).write_text(json.dumps(content[file]))
    (tmp_path / "secret.arrow").write_bytes(b"x")
    with pytest.raises(UserError, match="leads out of"):
        files_of(Source(path=str(saved), split=out if file == "dataset_dict.json" else None))


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a/b", ".hidden", "a\nb"])
@pytest.mark.parametrize("key", ["name", "models", "data", "losses", "baselines"])
def test_the_name_of_a_run_or_cell_is_one_word(name: str, key: str) -> None:
    tree = {"model": {"id": "m"}, "loss": {"type": "dpo"}, "optim": {"steps": 1}}
    with pytest.raises(UserError, match=r"name|study"):
        load_recipe(tree | ({"name": name} if key == "name" else {"study": {key: {name: "kldo"}}}))


# ---- secrets


def test_the_password_of_mlflows_uri_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:planted@127.0.0.1:1/?api_key=planted")
    recipe = load_recipe(
        {"output_dir": str(tmp_path), "model": {"id": "m"}, "loss": {"type": "dpo"}, "optim": {"steps": 1}}
    )
    messages: list[str] = []
    tracker = MlflowTracker(recipe, {}, messages.append, state_file=tmp_path / "mlflow.json")
    client_uri = tracker._client.tracking_uri
    tracker.finish()
    assert client_uri == "http://me:planted@127.0.0.1:1/?api_key=planted"
    assert tracker.uri == "http://me:***@127.0.0.1:1/?api_key=***"
    assert messages
    assert "planted" not in " ".join(messages)
    member = RunGroup(tmp_path / "trials", ClusterConfig(), forwarded_uri(recipe), None).member_recipe(
        recipe, "000", {}
    )
    save_recipe(member, tmp_path / "trial.yaml")
    assert "planted" not in (tmp_path / "trial.yaml").read_text()
    assert load_recipe(tmp_path / "trial.yaml") == member


def test_the_caches_uri_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray jobs get RAYDIV_CACHE, and the list of jobs shows it."""
    monkeypatch.setenv("RAYDIV_CACHE", "s3://key:planted@bucket/cache")
    with pytest.raises(UserError, match="RAYDIV_CACHE: has a password") as caught:
        shared_dir("prepared")
    assert "planted" not in str(caught.value)


# ---- Ray


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
@pytest.mark.parametrize("mode", [None, "token", "disabled"])
def test_a_local_ray_is_its_own_on_loopback_and_keeps_its_authentication(
    mode: str | None, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    settings: dict[str, Any] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(
        ray, "init", lambda **arguments: settings.update(arguments, mode=os.environ.get("RAY_AUTH_MODE"))
    )
    monkeypatch.setattr("raydiv.runtime.session.require_resources", lambda cluster: None)
    monkeypatch.setattr("raydiv.utils.compat.require_cluster", lambda address, seconds: None)
    monkeypatch.setattr("raydiv.utils.compat.write_ray_address", lambda folder: None)
    for name, value in (("RAY_ADDRESS", address), ("RAY_AUTH_MODE", mode)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with ray_session(ClusterConfig(), dashboard=True):
        pass
    assert settings["mode"] == mode
    assert settings["address"] == (address or "local")  # None is any cluster that was started on this machine
    assert settings.get("dashboard_host") == (None if address else "127.0.0.1")
    assert not any("AUTH" in name for name in settings["runtime_env"]["env_vars"])


def test_require_dashboard_asks_this_sessions_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an address Ray chooses one of several clusters of a machine, or fails."""
    addresses: list[str] = []
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    monkeypatch.setattr("ray.util.state.list_nodes", lambda address, **_: addresses.append(address))
    require_dashboard("a test")
    assert addresses == ["10.0.0.1:6379"]


SESSION = """
import ray
from raydiv.config.cluster import ClusterConfig
from raydiv.runtime.session import ray_session, require_dashboard
from ray.job_submission import JobSubmissionClient
with ray_session(ClusterConfig(), dashboard=True):
    require_dashboard("a test")
    address = ray.get_runtime_context().gcs_address
    JobSubmissionClient(address).list_jobs()
    print(address, ray._private.worker._global_node.webui_url, flush=True)
    input()
"""


def http_status(url: str, token: str | None) -> int:
    """HTTP status of a request with a token, or without one."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.long
def test_a_local_ray_refuses_requests_without_its_token(
    tmp_path: Path, tiny_model: Path, files: dict[str, str]
) -> None:
    token, recipe = "planted-token-of-32-characters-00", tmp_path / "recipe.yaml"
    save_recipe(recipe_of(tiny_model, files, tmp_path, "r", "cluster.num_workers=1"), recipe)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", SESSION],
        env=clean | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        try:
            address, dashboard = session.stdout.readline().split()
            port = int(dashboard.rpartition(":")[2])
            nodes = f"http://{dashboard}/api/v0/nodes"
            assert [http_status(nodes, sent) for sent in (None, "wrong", token)] == [401, 403, 200]
            processes = [psutil.Process(session.pid), *psutil.Process(session.pid).children(recursive=True)]
            listening = {
                process.pid: [c.laddr for c in process.net_connections(kind="inet") if c.status == "LISTEN"]
                for process in processes
            }
            assert {laddr.ip for laddrs in listening.values() for laddr in laddrs if laddr.port == port} == {
                "127.0.0.1"
            }
            assert len(listening[session.pid]) == 1  # the port of Ray's core, which requires the token
            command = [sys.executable, "-m", "raydiv", "prepare", str(recipe)]
            for variables, message in (
                ({"RAY_AUTH_MODE": "token"}, f"RAY_ADDRESS: {address}: RAY_AUTH_MODE is token"),
                ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"}, f"RAY_ADDRESS: cannot connect to {address}"),
            ):
                environment = clean | {"RAY_ADDRESS": address} | variables
                ended = subprocess.run(
                    command, env=environment, capture_output=True, text=True, check=False, timeout=300
                )
                assert ended.returncode == 2, ended.stderr
                last = ended.stderr.strip().splitlines()[-1]
                assert message in last
                assert "RAY_AUTH_TOKEN_PATH" in last
                assert "Traceback" not in ended.stderr
        finally:
            session.stdin.close()


# ---- data that changes


def write_rows(kind: str, path: Path, words: str) -> None:
    rows = [{"prompt": f"{words} {n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(2500)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)
    elif kind == "csv":
        path.write_text("prompt,chosen,rejected\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("change", ["rewritten", "replaced", "removed", "touched"])
@pytest.mark.usefixtures("own_cache")
def test_a_file_that_changes_while_it_is_read_is_refused(kind: str, change: str, tmp_path: Path, chat: Chat) -> None:
    path = tmp_path / f"data.{kind}"
    write_rows(kind, path, "first")
    opened = OpenSource(Source(path=str(path)), DataConfig(), BatchConfig(), chat)
    chunks = (chunk for reader in record_chunks([opened]) for chunk in reader())
    assert next(chunks).records
    if change == "touched":
        os.utime(path, ns=(1, 1))
        assert sum(len(chunk.records) for chunk in chunks) in (1500, 2000)
        return
    if change == "rewritten":
        write_rows(kind, path, "other")  # of the same size, in place
    elif change == "replaced":
        write_rows(kind, tmp_path / "new", "other")
        (tmp_path / "new").replace(path)
    else:
        path.unlink()
    with pytest.raises(UserError, match=rf"data\.{kind}: (changed while it was read|no such|cannot be)"):
        list(chunks)


def test_prompts_that_change_while_they_are_read_are_refused(
    tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(files["prompts"], tmp_path / "prompts.jsonl"))
    line_numbers = readers.line_numbers

    def change_file(*arguments: Any) -> dict[int, int]:
        path.write_text(path.read_text().replace("Hurt", "Harm"))
        return line_numbers(*arguments)

    monkeypatch.setattr(readers, "line_numbers", change_file)
    with pytest.raises(UserError, match=r"prompts\.jsonl: changed while it was read"):
        list(iterate_records(Source(path=str(path))))


@pytest.mark.long
@pytest.mark.usefixtures("own_cache", "ray")
def test_only_examples_edited_after_prepare_are_scored_again(
    tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    path = Path(shutil.copy(files["train"], tmp_path / "train.jsonl"))
    recipe = recipe_of(tiny_model, files | {"train": str(path)}, tmp_path, "r", "cluster.num_workers=1")
    before = prepare(recipe, ProgressDisplay(quiet=True)).summary()
    assert before["reference"]["misses"] == before["train"]["examples"] + before["eval"]["examples"] == 30
    status = path.stat()
    lines = path.read_text().splitlines(keepends=True)
    assert "number 3" in lines[3]
    path.write_text("".join([*lines[:3], lines[3].replace("about 3", "about 7"), *lines[4:]]))
    assert path.stat().st_size == status.st_size
    data = train(recipe, ProgressDisplay(quiet=True)).report["data"]
    assert data["fingerprint"] != before["fingerprint"]
    assert data["reference"] == {"hits": 29, "misses": 1}


# ---- an object store that is too small

SMALL_STORE = """
import sys, logging, ray
from pathlib import Path
from raydiv.cli import main
import raydiv.data.index
raydiv.data.index.SMALL_BYTES = -1
threshold = {"local_fs_capacity_threshold": 1e-6} if sys.argv[1] == "full" else {}
ray.init(
    address="local", num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False,
    logging_level=logging.ERROR, _system_config=threshold,
)
sys.exit(main(["prepare", sys.argv[2], "--json"]))
"""


@pytest.mark.long
@pytest.mark.parametrize("disk", ["free", "full"])
def test_rows_beyond_the_object_store_spill_to_disk_or_fail(
    disk: str, tmp_path: Path, tiny_model: Path, files: dict[str, str]
) -> None:
    """144 MB of rows that are read at once, in a store of 80 MiB; Ray's threshold makes the disk a full one."""
    data, recipe = tmp_path / "wide.parquet", tmp_path / "recipe.yaml"
    write_wide(data)
    changes = ("cluster.num_workers=1", "loss={type: sft, mix: null}", "data.eval=null")
    save_recipe(recipe_of(tiny_model, files | {"train": str(data)}, tmp_path, "r", *changes), recipe)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, "-c", SMALL_STORE, disk, str(recipe)],
        env=environment | {"RAYDIV_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if disk == "free":
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["train"]["examples"] == 2400
    else:
        assert ended.returncode == 1, ended.stderr
        last = ended.stderr.strip().splitlines()[-1]
        assert last.startswith("raydiv: the run failed: Ray's object store is full, and so is the disk")
        assert "RAY_TMPDIR" in last
        assert "Traceback" not in ended.stderr
