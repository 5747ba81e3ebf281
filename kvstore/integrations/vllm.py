"""vLLM takes the beginnings of its prompts from a store: a read-only KV connector, registered by this module's path.

    KVTransferConfig(kv_connector="KVStoreConnector", kv_connector_module_path="kvstore.integrations.vllm", kv_role="kv_consumer",
                     kv_connector_extra_config={"store": "/path/to/kv.zarr"}, kv_load_failure_policy="recompute")

The longest chain of stored segments that a prompt begins with is loaded, down to a whole number of vLLM's blocks; at least one token is computed.
Requests whose `cache_salt` begins with `kvstore-approx:` take documents compiled alone as well, side by side after that chain. The model is
identified by its checkpoint's files, as kvstore does everywhere; another one is refused when the engine starts. Loads are asynchronous: decoding
holds up no step, and of failed loads these are the ones that vLLM recomputes rightly (vllm-project/vllm#49250). Written for vLLM 0.32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

from kvstore.errors import InputError
from kvstore.fingerprint import checkpoint_folder, model_at
from kvstore.identity import difference, kv_config, require_same
from kvstore.integrations.vllm_cache import Engine, own_heads, require_served, stored_layers
from kvstore.integrations.vllm_loads import Loads, layer_writer
from kvstore.integrations.vllm_plan import Matcher, Settings, choose_encoding, require_tier
from kvstore.integrations.vllm_requests import Load, Requests
from kvstore.manifest import Model
from kvstore.prefixes import PrefixIndex
from kvstore.store import Store

_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")  # that read the checkpoint's safetensors files


@dataclass
class LoadList(KVConnectorMetadata):
    """What the scheduler tells the workers in one step."""

    loads: list[Load] = field(default_factory=list)


class KVStoreConnector(KVConnectorBase_V1):
    """See the module. Raises KvstoreError at the engine's start, naming the field, where model, cache or store do not fit together."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._settings = Settings.parse(self._kv_transfer_config.kv_connector_extra_config)
        if self._kv_transfer_config.kv_load_failure_policy != "recompute":
            raise InputError("with vLLM's default, a load that fails ends its request", remedy='set kv_load_failure_policy="recompute"')
        self._store = Store(self._settings.store)
        self._model = running_model(vllm_config)
        require_same(self._model, [r.model for r in self._store.models()])
        self._encoding = choose_encoding(self._store, self._model.key, self._settings.encoding)
        require_tier(self._store.encodings()[self._encoding], self._settings.quality)
        self._layout = self._store.model_record(self._model.key).layout
        require_served(running_engine(vllm_config, kv_cache_config, self._model), self._layout)
        self._block_size = int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        self._requests = self._matching() if role is KVConnectorRole.SCHEDULER else None
        self._loads: Loads | None = None

    def _matching(self) -> Requests:
        prefixes = PrefixIndex(self._store, self._model, self._encoding)
        templates = {r.template for r in self._store.rows(model=self._model.key, encoding=self._encoding)}
        anchors = sorted({self._store.template(t).anchor.ids for t in templates})
        return Requests(Matcher(self._store, prefixes, anchors, self._settings.quality, self._block_size))

    # scheduler side

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        tokens = self._requests.matched(request, num_computed_tokens) if self._requests else 0
        return tokens, tokens > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._requests:
            self._requests.allocated(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> LoadList:
        return LoadList(self._requests.take_due() if self._requests else [])

    def update_connector_output(self, connector_output: Any) -> None:
        if self._requests:
            self._requests.returned(connector_output.finished_recving or (), connector_output.invalid_block_ids)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Blocks are vLLM's own to free. What came from the store goes into the request's output."""
        taken = self._requests.closed(request.request_id) if self._requests else None
        return False, None if taken is None else {"kvstore": taken}

    def reset_cache(self) -> bool:
        """See what was committed to the store meanwhile."""
        self._store.refresh()
        if self._requests:
            self._requests.matcher = self._matching().matcher
        return True

    # worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        config = self._vllm_config
        found = {name: config.compilation_config.static_forward_context[name] for name in kv_caches}
        own = {name: layer for name, layer in found.items() if getattr(layer, "kv_sharing_target_layer_name", None) is None}
        model_layers = int(getattr(config.model_config.hf_text_config, "num_hidden_layers", 0))
        index = stored_layers(list(own), self._layout.layers, model_layers, config.parallel_config.pipeline_parallel_size)
        writers = {index[name]: layer_writer(layer) for name, layer in own.items()}
        heads = own_heads(get_tensor_model_parallel_rank(), config.parallel_config.tensor_parallel_size, self._layout.kv_heads)
        self._loads = Loads(self._store, self._layout, writers, heads, self._block_size, self._settings.workers)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        if self._loads is None:
            raise InputError("vLLM did not register its caches", remedy="run without the connector")
        if isinstance(metadata, LoadList):
            self._loads.start(metadata.loads)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, None if self._loads is None else self._loads.finish() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self._loads is None else self._loads.take_damaged()

    def shutdown(self) -> None:
        if self._loads is not None:
            self._loads.close()

    # a store is compiled offline: nothing is saved, and loads are complete before vLLM schedules their request

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return


def running_model(config: Any) -> Model:
    """The identity of the model that vLLM runs, from its checkpoint's files and in its dtype: never from a worker's tensors, which are fused."""
    model = config.model_config
    return model_at(checkpoint_folder(str(model.model), model.revision), str(model.dtype).removeprefix("torch."))


def running_engine(config: Any, cache: Any, model: Model) -> Engine:
    """What vLLM says of its cache and of changes to its model."""
    spec = cache.kv_cache_groups[0].kv_cache_spec if cache.kv_cache_groups else None
    parallel = config.parallel_config
    return Engine(
        spec=type(spec).__name__,
        groups=len(cache.kv_cache_groups),
        dtype=str(getattr(spec, "dtype", None)).removeprefix("torch."),
        heads=int(getattr(spec, "num_kv_heads", 0)),
        key_width=int(getattr(spec, "head_size", 0)),
        value_width=int(getattr(spec, "head_size_v", 0)),
        ranks=int(parallel.tensor_parallel_size),
        context_parallel=int(parallel.decode_context_parallel_size) * int(parallel.prefill_context_parallel_size),
        quantized="" if int(getattr(spec, "kv_quant_mode", 0)) == 0 else str(config.cache_config.cache_dtype),
        changes=tuple(_changes(config, model)),
    )


def _changes(config: Any, model: Model) -> list[str]:
    """What makes the running model another than its files say."""
    given, found = config.model_config, []
    if config.load_config.load_format not in _FORMATS:
        found.append(f"load_format {config.load_config.load_format}")
    if given.quantization is not None and model.quantization is None:
        found.append(f"quantization {given.quantization}")
    if given.hf_overrides:
        found += [f"hf_overrides {name}" for name in _overridden(given.hf_text_config, model)]
    return found


def _overridden(config: Any, model: Model) -> list[str]:
    """Config fields that change KV and are not what the checkpoint says."""
    return difference(msgspec.structs.replace(model, config=kv_config(config.to_dict())), model)
