"""The model a command works with: the one it was given, the store's own, or the bundled one; loaded only when something must be computed."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore import bundled
from kvstore.devices import usual_device
from kvstore.errors import IncompatibleError, InputError
from kvstore.families.masking import mask_dropped, require_masking
from kvstore.families.measure import require_layout
from kvstore.families.refuse import context_tokens
from kvstore.fingerprint import check_probe, model_at, model_of, probe_ids, probe_sketch
from kvstore.identity import require_same
from kvstore.manifest import FORMAT, Layout, Model, ModelRecord
from kvstore.records import add_model
from kvstore.store import Store

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BUNDLED = "bundled"
log = logging.getLogger("kvstore")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


class ModelSource:
    """A model by path, hub id or object, with its tokenizer. Identity first; weights are loaded at the first use of `model`.

    `given` None means the bundled model. Raises InputError where nothing can be found under a name.
    """

    def __init__(self, given: Any = None, tokenizer: Any = None, *, dtype: str | None = None, device: str | None = None):
        self.given, self._tokenizer, self.device = given, tokenizer, device
        self.dtype = None if dtype is None else str(dtype).removeprefix("torch.")
        self.is_object = given is not None and not isinstance(given, (str, Path))
        if self.is_object and tokenizer is None:
            raise InputError("a model object needs its tokenizer", remedy="pass tokenizer=")
        if self.is_object and (dtype is not None or device is not None):
            raise InputError("dtype and device belong to a model that kvstore loads", remedy="move or cast the object yourself: model.to(...)")
        if self.is_object and not (hasattr(given, "config") and hasattr(given, "state_dict")):
            raise InputError(f"{type(given).__name__} is not a transformers model", remedy="pass a path, a hub id or a loaded model")
        if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
            raise InputError(f"{type(tokenizer).__name__} is not a tokenizer", remedy="pass AutoTokenizer.from_pretrained(...)")

    @cached_property
    def folder(self) -> Path:
        """The checkpoint on disk; a hub id is fetched into the hub's own cache where it is not there yet."""
        if self.given is None or str(self.given) == BUNDLED:
            return bundled.model_path()
        if Path(self.given).is_dir():
            return Path(self.given)
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(str(self.given), allow_patterns=_HUB_FILES))
        except Exception as error:  # the hub raises many kinds: all mean that the name leads nowhere
            raise InputError(
                f"no model at {self.given!r}: {str(error).splitlines()[0]}",
                remedy="give a folder saved by save_pretrained, or the id of a model that can be reached",
            ) from error

    @cached_property
    def identity(self) -> Model:
        return model_of(self.given) if self.is_object else model_at(self.folder, self.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        if self._tokenizer is not None:
            return self._tokenizer
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self.folder))

    @cached_property
    def model(self) -> PreTrainedModel:
        if self.is_object:
            return self.given
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        log.info("loading %s", self.folder)
        device = usual_device(self.device)
        with torch.inference_mode(False):  # the weights outlive the caller's mode
            found, info = transformers.AutoModelForCausalLM.from_pretrained(str(self.folder), dtype=self.identity.dtype, output_loading_info=True)
            made_up = sorted({*info["missing_keys"], *(str(k) for k in info["mismatched_keys"])})
            if made_up:
                raise IncompatibleError(
                    f"{self.folder} lacks {len(made_up)} tensors of the model (first: {made_up[0]}), which would be random",
                    remedy="fetch or save the checkpoint again",
                )
            return found.to(device).eval()

    @property
    def place(self) -> torch.device:
        """Where the model lies, or will when it is loaded."""
        return self.given.device if self.is_object else usual_device(self.device)

    def state(self) -> tuple[Any, ...]:
        """Changes when the live model's dtype or any of its weights is changed in place; cheap."""
        parameters = list(self.model.parameters())
        versions = sum(0 if p.is_inference() else p._version for p in parameters)
        return (str(self.model.dtype), len(parameters), versions, tuple(sorted(getattr(self.model, "peft_config", None) or ())))

    @cached_property
    def layout(self) -> Layout:
        """How the live model's cache is laid out and rotated, as measured. Raises IncompatibleError."""
        return require_layout(self.model)

    @cached_property
    def context_tokens(self) -> int:
        """Positions that a prompt may take: those the model was made for, with length-dependent RoPE those of the one regime that is served."""
        if self.is_object:
            config = self.given.config
        else:
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(str(self.folder))
        return context_tokens(config.get_text_config(decoder=True))

    @property
    def source(self) -> str:
        """What loads this model again: kept in the store as provenance."""
        if self.is_object:
            return str(self.given.config._name_or_path or "")
        if self.folder == bundled.model_path():
            return BUNDLED
        return str(Path(self.given).absolute()) if Path(self.given).is_dir() else str(self.given)

    def layout_in(self, store: Store) -> Layout:
        """The layout, from the store where it knows the model."""
        return store.model_record(self.identity.key).layout if store.has_model(self.identity.key) else self.layout

    def register(self, store: Store, provenance: dict[str, str]) -> None:
        """Check the live model against the store's probe, or keep its probe where the store sees it first."""
        if store.has_model(self.identity.key):
            self.check(store)
            return
        ids = probe_ids(int(self.model.config.get_text_config(decoder=True).vocab_size))
        record = ModelRecord(FORMAT, "model", self.identity, self.layout, ids, provenance | {"source": self.source})
        add_model(store.storage, record, probe_sketch(self.model, self.layout, ids))

    def check(self, store: Store) -> None:
        """Run the probe (which also proves the stored rotation). Raises IncompatibleError where the live model computes other K and V."""
        record = store.model_record(self.identity.key)
        found = probe_sketch(self.model, record.layout, record.probe_ids)
        check_probe(found, store.probe(self.identity.key), record.layout.dtype)

    def require_masking(self, what: str) -> None:
        """Let the model take `what` with its dropped tokens: a model that kvstore loaded is given the attention for it, another must have it.

        Raises IncompatibleError.
        """
        if not self.is_object:
            mask_dropped(self.model)
        require_masking(self.model.config, what)

    def require_known(self, store: Store) -> None:
        """Raises IncompatibleError naming the field that differs where the store holds only other models' artifacts."""
        require_same(self.identity, [r.model for r in store.models()])


def model_for(store: Store | None, given: Any, *, dtype: str | None = None, device: str | None = None) -> ModelSource:
    """`given`, else the model the store was built by, else the bundled one with a warning."""
    if given is not None:
        return ModelSource(given, dtype=dtype, device=device)
    known = [r.provenance.get("source", "") for r in store.models()] if store is not None else []
    if len(set(known)) > 1:
        raise InputError(f"the store holds {len(known)} models: {', '.join(known)}", remedy="say which with --model", code="ambiguous")
    if known and known[0]:
        return ModelSource(known[0], dtype=dtype, device=device)
    log.warning("no model given: using the small bundled one, which is there to try kvstore out")
    return ModelSource(None, dtype=dtype, device=device)
