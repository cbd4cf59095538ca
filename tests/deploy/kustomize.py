"""As much of kustomize as deploy/kubernetes uses, so that its result can be judged where the program is not installed.

Resources, components, strategic merge patches, JSON patches, images, a namespace, and config maps without the hash in their names.
What else a kustomization says is refused. test_kubernetes.py compares the result with kustomize's own where there is one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]

KNOWN = {"apiVersion", "kind", "resources", "components", "patches", "images", "namespace", "configMapGenerator"}
MERGED = {
    "containers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}  # lists by their keys


def build(folder: Path, below: list[Resource] | None = None) -> list[Resource]:
    """The resources that a folder makes; of a component, `below` changed by it."""
    content = yaml.safe_load((folder / "kustomization.yaml").read_text("utf-8"))
    unknown = content.keys() - KNOWN
    if unknown:
        raise ValueError(f"{folder}: {unknown} is not known here")
    found = [] if below is None else below
    for name in content.get("resources", []):
        path = folder / name
        found += build(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text("utf-8")))
    found += [_config_map(folder, entry) for entry in content.get("configMapGenerator", [])]
    for name in content.get("components", []):
        found = build(folder / name, found)
    for patch in content.get("patches", []):
        _patch(folder, patch, found)
    for resource in found:
        if "namespace" in content:
            resource["metadata"]["namespace"] = content["namespace"]
        for image in content.get("images", []):
            _set_image(resource, image)
    return found


def _config_map(folder: Path, entry: dict[str, Any]) -> Resource:
    data = {Path(name).name: (folder / name).read_text("utf-8") for name in entry["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": entry["name"]}, "data": data}


def _patch(folder: Path, patch: dict[str, Any], resources: list[Resource]) -> None:
    content = yaml.safe_load((folder / patch["path"]).read_text("utf-8") if "path" in patch else patch["patch"])
    kind, name = (patch["target"]["kind"], patch["target"]["name"]) if "target" in patch else (content["kind"], content["metadata"]["name"])
    (index,) = (i for i, one in enumerate(resources) if (one["kind"], one["metadata"]["name"]) == (kind, name))
    if isinstance(content, list):
        for operation in content:
            _operate(resources[index], operation)
    else:
        resources[index] = merged(resources[index], content)


def merged(old: Any, new: Any, key: str = "") -> Any:
    """A strategic merge: mappings by key, null deletes, some lists by the name of their entries, all else is replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        both = {name: merged(old[name], value, name) if name in old else copy.deepcopy(value) for name, value in new.items()}
        return {name: value for name, value in (old | both).items() if value is not None}
    if isinstance(old, list) and isinstance(new, list) and key in MERGED:
        by = MERGED[key]
        known = {entry[by]: entry for entry in old}
        return list((known | {entry[by]: merged(known.get(entry[by], {}), entry) for entry in new}).values())
    return copy.deepcopy(new)


def _operate(resource: Resource, operation: dict[str, Any]) -> None:
    """One operation of a JSON patch: replace, or add at the end of a list."""
    *path, last = operation["path"].strip("/").split("/")
    place: Any = resource
    for part in path:
        place = place[int(part)] if isinstance(place, list) else place[part]
    if operation["op"] == "add" and last == "-":
        place.append(operation["value"])
    elif operation["op"] == "replace":
        index = int(last) if isinstance(place, list) else last
        place[index]  # it must be there
        place[index] = operation["value"]
    else:
        raise ValueError(f"{operation} is not known here")


def _set_image(resource: Resource, image: dict[str, str]) -> None:
    for container in resource["spec"]["template"]["spec"]["containers"] if resource["kind"] == "Deployment" else []:
        name, _, tag = container["image"].partition(":")
        if name == image["name"]:
            container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
