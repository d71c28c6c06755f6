"""The checkpointer of detection models."""

import pickle
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from .c2_model_loading import align_and_update_state_dicts

_FILLED_FROM_CONFIG = ("pixel_mean", "pixel_std")
_HEURISTICS = "matching_heuristics"


class DetectionCheckpointer(Checkpointer):
    """fvcore's Checkpointer with the model zoo's addresses and its matching of names.

    A checkpoint that says `matching_heuristics`, or that is loaded from `PATH?matching_heuristics=
    True`, is matched to the model by name suffixes; one whose `__author__` is "Caffe2" has its
    names converted before. Only the main process writes, unless `save_to_disk` says otherwise.

    Files are read without unpickling objects. Unlike in Detectron2, `.pkl` files are therefore
    refused, unless a subclass overrides `_load_file` with a safe reader.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ):
        on_disk = comm.is_main_process() if save_to_disk is None else save_to_disk
        super().__init__(model, save_dir, save_to_disk=on_disk, **checkpointables)
        self.path_manager = PathManager
        self._queries: dict[str, list[str]] = {}

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load `path` (file, URL or detectron2://), with an optional query, into the model."""
        url = urlparse(path or "")
        self._queries = parse_qs(url.query)
        if path:
            path = self.path_manager.get_local_path(url._replace(query="").geturl())
        return super().load(path, *args, **kwargs)

    def _load_file(self, f: str) -> dict[str, Any]:
        if f.endswith((".pkl", ".pyth")):
            raise pickle.UnpicklingError(
                f"{f} is a pickle, and unpickling runs the code that it holds. Load it with the "
                "checkpointer of s4m_d2.engine, which reads arrays only."
            )
        loaded = torch.load(f, map_location="cpu", weights_only=True)
        if "model" not in loaded:
            loaded = {"model": loaded}
        unknown = {name: value for name, value in self._queries.items() if name != _HEURISTICS}
        if unknown:
            raise ValueError(f"unsupported query {unknown} after the file name {f}")
        if self._queries.get(_HEURISTICS) == ["True"]:
            loaded[_HEURISTICS] = True
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]):
        if checkpoint.get(_HEURISTICS, False):
            self._convert_ndarray_to_tensor(checkpoint["model"])
            from_caffe2 = checkpoint.get("__author__") == "Caffe2"
            checkpoint["model"] = align_and_update_state_dicts(
                self.model.state_dict(), checkpoint["model"], c2_conversion=from_caffe2
            )
        incompatible = super()._load_model(checkpoint)
        buffers = dict(self.model.named_buffers(recurse=False))
        for name in _FILLED_FROM_CONFIG:  # a file may lack them: the config has set them
            if name in buffers and name in incompatible.missing_keys:
                incompatible.missing_keys.remove(name)
        return incompatible
