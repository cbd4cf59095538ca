"""The layer loop: runs a transformers model's own modules on a packed row, one decoder layer after another.

No model code is copied: embedding, rotary tables, norms and head are the model's, attention and feed-forward are replaced by those of
fused.py, layers that are of the plain build by those of plain_layer.py. Early exit and pruning need the loop between the layers, which is
why it is here and not the model's `forward`. What differs between architectures (windows, rotary tables by layer type, shapes) is read
off the modules and their calls; no model is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from engine.errors import UnsupportedModel
from engine.kv.cache import KVCache
from engine.model.attention import AttentionKind, AttentionShape, LayerAttention, PagedContext, Segment
from engine.model.draft_vocabulary import NEVER
from engine.model.fused import FusedAttention, FusedMLP
from engine.model.gather_attention import GATHER
from engine.model.layer_math import TORCH, LayerMath, weight_and_epsilon
from engine.model.linear import AS_THEY_ARE, Inputs, LinearKind, joined, some_outputs
from engine.model.plain_layer import OwnLayer, PlainLayer, Stream, why_not_plain
from engine.model.probe import PROBE, PretendedPast, Watch
from engine.model.rotary import RotaryTables
from engine.model.state_adapter import StateAdapter

# largest difference of logits, relative to the largest logit, that is rounding and not a mistake
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_OBSERVED = 256  # tokens over which inputs are observed


ChooseAttention = Callable[[AttentionShape], AttentionKind]


class DecoderStack:
    """A causal language model of the Llama kind, seen as embedding, layers, norm and head.

    `windows` are the distinct sliding windows of its layers (None for layers that see everything), `kv_shape` is key-value heads and
    head dimension of a layer, `attention` the kind that its passes use, `attention_shape` what they ask of it, `block_size` that of the
    cache for which it was chosen.
    """

    def __init__(
        self,
        model: Any,
        kind: LinearKind = AS_THEY_ARE,
        draft_ids: Tensor | None = None,
        choose_attention: ChooseAttention = lambda _: GATHER,
        block_size: int = 16,
        math: LayerMath = TORCH,
    ):
        """`model` is a transformers ...ForCausalLM, in eval mode; its layers are rebuilt here, and its own forward is of no use any more.
        `draft_ids` [N] are the tokens that its head is cut to; None for all. `math` computes what lies between products.

        Raises UnsupportedModel where the packed loop does not compute what the model's own forward did.
        """
        self._model = model
        self._body = model.model
        self.config = model.config
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.vocab_size = int(model.lm_head.out_features)  # rows of the full head; may be padded beyond the tokenizer's vocabulary
        self._draft_ids = None if draft_ids is None else draft_ids.to(self.device)
        self.adapter: StateAdapter | None = None  # of a drafter that reads its target's states
        self._math = math
        watch, expected = self._own_forward()
        self.windows, self.kv_shape = watch.windows, watch.kv_shape
        self.attention_shape = AttentionShape(watch.num_heads, *self.kv_shape, self.windows, self.dtype, self.device)
        self._rotary = RotaryTables(model, self._body.embed_tokens.weight[None, :1], math.tables)
        self.attention, self.block_size = choose_attention(self.attention_shape), block_size
        self._rebuild(watch, kind, self._largest_inputs() if kind.reads_inputs else {})
        self._require_equal(expected, kind)

    @property
    def num_layers(self) -> int:
        return len(self._body.layers)

    @property
    def num_weight_bytes(self) -> int:
        modules = [self._model, *([self.adapter] if self.adapter else [])]
        weights = [weight for module in modules for weight in (*module.parameters(), *module.buffers())]
        return sum(w.nbytes for w in {id(w): w for w in weights}.values())

    def hidden(self, input_ids: Tensor, paged: PagedContext) -> Tensor:
        """Normed hidden states [N, hidden] of a packed row of ids [N]."""
        return self._body.norm(*self.layers(self.embed(input_ids), paged, 0, self.num_layers))  # type: ignore[no-any-return]

    def embed(self, input_ids: Tensor) -> Stream:
        """States [N, hidden] that enter the first layer."""
        return self._body.embed_tokens(input_ids.unsqueeze(0))[0], None

    def layers(self, stream: Stream, paged: PagedContext, first: int, end: int) -> Stream:
        """States behind layers first, first + 1, ..., end - 1; overwrites those that come in, and writes these layers' KV."""
        kinds = self._rotary.kinds[first:end]
        rotary = self._rotary.at(paged.positions, kinds)
        for layer, kind in zip(self._body.layers[first:end], kinds, strict=True):
            stream = layer(stream, rotary[kind], paged)
        return stream

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, V] of normed hidden states [R, hidden]."""
        logits: Tensor = self._model.lm_head(hidden)
        if self._draft_ids is None:
            return logits
        return logits.new_full((len(logits), self.vocab_size), NEVER).index_copy_(-1, self._draft_ids, logits)

    @torch.inference_mode()
    def _own_forward(self) -> tuple[Watch, Tensor]:
        """What the layers ask of attention, and the model's own logits for two short sequences.

        These are too short for most windows, so the model is also asked which positions it hides at each window's edge.
        """
        watch = Watch(self.config.model_type)
        self._model.set_attn_implementation(PROBE)
        expected = torch.cat([self._model(row.unsqueeze(0), use_cache=False, watch=watch).logits[0] for row in self._check_ids()])
        watch.require_all(self.num_layers)
        for window in filter(None, watch.windows):
            past = PretendedPast(window)
            self._model(self._check_ids()[1].unsqueeze(0), use_cache=False, past_key_values=past, watch=watch, past=past)
        return watch, expected

    @torch.inference_mode()
    def _largest_inputs(self) -> Mapping[nn.Module, Tensor]:
        """How large each input [in] of each linear layer gets over a text of any tokens.

        Which inputs are large is the model's property and hardly the text's. They are largest at the first position, which all others
        look at.
        """
        found: MutableMapping[nn.Module, Tensor] = WeakKeyDictionary()  # it must not keep a layer that was replaced

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[module] = args[0].flatten(0, -2).abs().amax(0)

        hooks = [module.register_forward_pre_hook(note) for module in self._model.modules() if isinstance(module, nn.Linear)]
        self._model(self._ids(_OBSERVED, first=100).unsqueeze(0), use_cache=False, watch=Watch(self.config.model_type))
        for hook in hooks:
            hook.remove()
        return found

    def _rebuild(self, watch: Watch, kind: LinearKind, largest: Mapping[nn.Module, Tensor]) -> None:
        """Replace modules one by one, so that weights are never held twice. `largest` has the largest inputs [in] of linear layers."""

        def make(*own: nn.Linear, has_heavy_tails: bool = False) -> nn.Module:
            return kind.make(joined(own) if len(own) > 1 else own[0], Inputs(largest.get(own[0]), has_heavy_tails))

        for index, layer in enumerate(self._body.layers):
            call = watch.calls[index]
            reason = why_not_plain(layer, self._body.embed_tokens.weight)
            asked = LayerAttention(index, call.window, call.scaling)
            layer.self_attn = FusedAttention(layer.self_attn, asked, call.kv_shape[0], make, self._math)
            layer.mlp = FusedMLP(layer.mlp, make, self._math)
            for name, child in list(layer.named_children()):
                if weight_and_epsilon(child) is not None:
                    setattr(layer, name, self._math.norm(child))
            if reason is not None:
                self._math.say(f"Layers keep their own forward, which sums and norms one after another: {reason}")
            self._body.layers[index] = PlainLayer(layer) if reason is None else OwnLayer(layer)
        self._body.norm = self._math.norm(self._body.norm)
        head = self._model.lm_head
        cut = head if self._draft_ids is None else some_outputs(head, self._draft_ids)
        self._model.lm_head = kind.make(cut, Inputs(largest.get(head)))

    @torch.inference_mode()
    def _require_equal(self, expected: Tensor, kind: LinearKind) -> None:
        """The same sequences, packed, must get the logits [N, V] that the model's own forward gave each of them."""
        tolerance = _TOLERANCE[self.dtype] + kind.rounding
        ids, size = self._check_ids(), self.block_size
        ends = list(accumulate(-(-len(row) // size) for row in ids))
        cache = KVCache(self.num_layers, ends[-1] * size, self.kv_shape, self.dtype, self.device)
        segments = [Segment(range(first, end), 0, len(row)) for row, first, end in zip(ids, [0, *ends], ends, strict=False)]
        attention = self.attention.over(cache, size, self.attention_shape)
        got = self.logits(self.hidden(torch.cat(ids), attention.context(segments)))
        if self._draft_ids is not None:
            got, expected = got[:, self._draft_ids], expected[:, self._draft_ids]
        difference = float((got - expected).abs().max() / expected.abs().max())
        if not difference <= tolerance:
            raise UnsupportedModel(
                f"{self._model.config.model_type}: two packed sequences get other logits than the model's own forward gives them "
                f"(off by {difference:.1e} of the largest logit; {tolerance:.0e} is allowed in {self.dtype} with {kind.note})."
            )

    def _check_ids(self) -> list[Tensor]:
        return [self._ids(n) for n in (9, 5)]

    def _ids(self, num: int, first: int = 1) -> Tensor:
        """Fixed ids [num] from all over the vocabulary, so that a start is repeatable. What is checked is not what is observed."""
        return torch.arange(first, first + num, device=self.device) * 7919 % self.vocab_size
