"""GET /v1/models and /v1/models/{id}: the deployment's name, its aliases, and each of them with each preset."""

from __future__ import annotations

from fastapi import APIRouter

from server.deps import Served, Serving
from server.errors import UnknownModel
from server.openai.response_schema import Model, ModelList

router = APIRouter()


@router.get("/models")
async def list_models(serving: Served) -> ModelList:
    """Every model id that is served."""
    return ModelList(data=[_model(model_id, serving) for model_id in serving.deployment.model_ids])


@router.get("/models/{model_id:path}")
async def get_model(model_id: str, serving: Served) -> Model:
    """One model id; it may hold slashes."""
    if model_id not in serving.deployment.model_ids:
        raise UnknownModel(model_id, tuple(serving.deployment.model_ids))
    return _model(model_id, serving)


def _model(model_id: str, serving: Serving) -> Model:
    name = serving.deployment.model.name
    parent = None if model_id == name else name
    return Model(id=model_id, created=serving.started_at, root=name, parent=parent, max_model_len=serving.info.max_model_len)
