"""launch/kubernetes against the operator's own types."""

import re
from pathlib import Path

import pytest
import yaml

MANIFEST = Path(__file__).parents[2] / "launch" / "kubernetes" / "pytorchjob.yaml"


def faults(value, kind: str, models, where: str = "") -> list[str]:
    """What of a manifest is not of the type that the operator's schema gives it."""
    if match := re.fullmatch(r"list\[(.+)\]|dict[(\[]str, (.+)[)\]]", kind):
        of_list, of_dict = match.groups()
        if not isinstance(value, list if of_list else dict):
            return [f"{where}: expected {kind}, found {value!r}"]
        entries = enumerate(value) if of_list else value.items()
        inner = of_list or of_dict
        return [f for key, entry in entries for f in faults(entry, inner, models, f"{where}.{key}")]
    plain = {"str": str, "int": int, "bool": bool, "object": object}
    if kind in plain:
        fits = isinstance(value, plain[kind])
        return [] if fits else [f"{where}: expected {kind}, found {value!r}"]
    model = models[kind]
    if not isinstance(value, dict):
        return [f"{where}: expected {kind}, found {value!r}"]
    python_names = {name: attribute for attribute, name in model.attribute_map.items()}
    found = [f"{where}: {kind} has no {key}" for key in value if key not in python_names]
    for key, entry in value.items():
        if key in python_names:
            found += faults(entry, model.openapi_types[python_names[key]], models, f"{where}.{key}")
    if not found:
        arguments = {python_names[key]: entry for key, entry in value.items()}
        try:
            model(**arguments)  # which keys are required
        except ValueError as error:
            found.append(f"{where}: {error}")
    return found


@pytest.fixture(scope="module")
def models():
    pytest.importorskip("kubeflow.training", reason="pip install kubeflow-training: extra dev")
    import kubernetes.client.models as of_kubernetes
    from kubeflow.training import models as of_operator

    return {**vars(of_kubernetes), **vars(of_operator)}


@pytest.fixture
def manifest():
    return yaml.safe_load(MANIFEST.read_text())


def test_the_manifest_fits_the_operator_schema(manifest, models):
    assert faults(manifest, "KubeflowOrgV1PyTorchJob", models) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: m["spec"].update(nprocPerNodes="8"), "has no nprocPerNodes"),
        (lambda m: m["spec"].update(nprocPerNode=8), "expected str, found 8"),
        (lambda m: m["spec"].pop("pytorchReplicaSpecs"), "must not be `None`"),
    ],
    ids=["unknown key", "wrong type", "missing key"],
)
def test_the_schema_finds_faults(manifest, models, damage, said):
    damage(manifest)
    assert said in "\n".join(faults(manifest, "KubeflowOrgV1PyTorchJob", models))


def test_ranks_and_gpus_agree_and_the_shared_memory_is_there(manifest):
    spec = manifest["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert spec["nprocPerNode"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert spec["elasticPolicy"]["minReplicas"] == worker["replicas"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted["shm"] == "/dev/shm"
    assert {volume["name"] for volume in worker["template"]["spec"]["volumes"]} == set(mounted)
