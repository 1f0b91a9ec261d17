"""Every recipe and layer pattern as a model of transformers, with its Auto classes.

B rows, T new tokens, V vocabulary, L blocks.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from atlas_blocks import Config, check
from atlas_blocks.blocks.base import Block, Documents
from atlas_blocks.blocks.feed_forward import MixtureOfExperts, balance_loss
from atlas_blocks.blocks.foreign import built
from atlas_blocks.blocks.norm import RMSNorm
from atlas_blocks.blocks.parameters import Linear
from atlas_blocks.recipes import registry
from atlas_blocks.recipes.hugging_face.attention import start
from atlas_blocks.recipes.hugging_face.cache import StateLayer, brought, layer_of
from atlas_blocks.recipes.hugging_face.padding import Places, held, places_of, run_placed
from atlas_blocks.recipes.model import (
    LanguageModelConfig,
    LanguageModelState,
    TokenEmbedding,
    start_widths,
)
from atlas_blocks.recipes.rows import one_token_at_a_time


class AtlasConfig(PreTrainedConfig):
    """A LanguageModelConfig in the words of transformers.

    layers: a pattern such as "3*atlas+transformer", or the configs of one turn as dicts, which is
    what is kept. recipe: a name, for people.
    `AtlasConfig.from_recipe("atlas-mag-tiny")` and `AtlasConfig.of(language_model_config)` make
    one; `language_model()` is the way back. Raises ValueError as LanguageModelConfig does.
    """

    model_type = "atlas"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own name)

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int | None = None
    num_attention_heads: int = 4
    layers: str | list[Any] = "atlas"
    recipe: str = ""
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        whole = self.language_model()
        self.num_hidden_layers = whole.depth
        self.layers = whole.to_dict()["layers"]
        super().__post_init__(**kwargs)

    def language_model(self) -> LanguageModelConfig:
        """The same for LanguageModel."""
        layers = self.layers
        if not isinstance(layers, str):
            layers = [x if isinstance(x, str) else Config.from_dict(x) for x in layers]
        return LanguageModelConfig(
            self.recipe,
            self.vocab_size,
            self.hidden_size,
            self.num_attention_heads,
            self.num_hidden_layers,
            layers,
            self.tie_word_embeddings,
        )

    def to_diff_dict(self) -> dict[str, Any]:
        """What files hold: all that defines the model, also where it is the default of today."""
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "layers")
        whole = {name: getattr(self, name) for name in (*names, "tie_word_embeddings")}
        return super().to_diff_dict() | whole

    @classmethod
    def of(cls, config: LanguageModelConfig, **options: Any) -> AtlasConfig:
        """options: what else transformers keeps, such as eos_token_id."""
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            layers=config.to_dict()["layers"],
            recipe=config.name,
            tie_word_embeddings=config.tie_embeddings,
            **options,
        )

    @classmethod
    def from_recipe(cls, name: str, **changes: Any) -> AtlasConfig:
        """changes: of the recipe's config, as for `build`."""
        return cls.of(registry.config(name).replace(**changes))


class AtlasPreTrainedModel(PreTrainedModel):
    config_class = AtlasConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Assisted generation would take back what memories have written: transformers refuses it.
    _is_stateful = True
    _no_split_modules = ["AtlasLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not start(module):
            super()._init_weights(module)


class AtlasLayer(GradientCheckpointingLayer):
    """A block where transformers expects layers: checkpointed, sharded and placed as one."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, x: Tensor, state: Any = None, documents: Documents | None = None, kept: bool = True
    ) -> tuple[Tensor, Any]:
        """x [B, T, dim] -> [B, T, dim], and the state after it if it is to be kept."""
        x, state = self.block(x, state, cu_seqlens=documents, detach_state=False)
        return x, state if kept else None


class AtlasModel(AtlasPreTrainedModel):
    """Embedding, blocks and final norm, x [B, T, dim] between them."""

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__(config)
        whole = config.language_model()
        self.embed_tokens = TokenEmbedding(whole.vocab_size, whole.dim)
        self.layers = nn.ModuleList(
            AtlasLayer(built(layer, whole.dim, whole.heads)) for layer in whole.layers
        )
        self.norm = RMSNorm(whole.dim)
        self.gradient_checkpointing = False
        start_widths(self, whole.dim)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids int [B, T], or inputs_embeds [B, T, dim] -> last_hidden_state [B, T, dim].

        attention_mask: [B, tokens so far], 0 at padding, wherever that stands; position_ids: which
        documents are packed in a row (every one begins anew); blocks count positions themselves.
        past_key_values: a DynamicCache of this model's. use_cache: None is the config's, but in
        training False. With a cache, what comes at padding is what came at the token before it, so
        that `generate` goes on from rows padded at the right, too.
        unused: what transformers tells all models.
        Raises ValueError for masks, positions and caches of other kinds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected them or inputs_embeds, got both or neither")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = past_key_values
        # Without gradients, as `generate` runs, there is nothing to checkpoint.
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None and cache.get_seq_length():
                check.fail("past_key_values", "none with gradient checkpointing", "a filled one")
            cache = None
        elif use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        parts = [] if cache is None else [layer_of(cache, i) for i in range(len(self.layers))]
        past = parts[0] if parts else None
        # Of later calls `generate` counts them on from padding: rows know theirs.
        positions = None if past is not None and past.length else position_ids
        places = places_of(attention_mask, positions, x, past)
        found: list[list[Tensor]] = []
        offloaded = bool(getattr(cache, "offloading", False))
        run = functools.partial(self._run, found=found, kept=past is not None, offloaded=offloaded)
        decoded = past is not None and past.real is not None and not torch.is_grad_enabled()
        with one_token_at_a_time(x.device) if decoded and x.shape[1] == 1 else nullcontext():
            y, after = run_placed(run, x, self._before(parts, x), places, past is not None)
        if past is not None:
            y = _kept(parts, after, places, y)
        hidden = None
        if output_hidden_states:
            hidden = (*(_placed(h, places, x) for h in found[0]), y)
        return BaseModelOutputWithPast(
            last_hidden_state=y, past_key_values=cache, hidden_states=hidden
        )

    def _run(
        self,
        x: Tensor,
        state: Any,
        cu_seqlens: Tensor | None,
        *,
        found: list[list[Tensor]],
        kept: bool,
        offloaded: bool,
    ) -> tuple[Tensor, LanguageModelState | None]:
        """x [B, T, dim] -> [B, T, dim], the states; what every block is given goes to `found`."""
        documents = None if cu_seqlens is None else Documents.check(cu_seqlens, x)
        before = (None,) * len(self.layers) if state is None else state.blocks
        hidden, after = [], []
        for layer, block_state in zip(self.layers, before, strict=True):
            hidden.append(x)
            x, block_state = layer(x, brought(block_state, x.device), documents, kept)
            after.append(
                block_state.cpu() if offloaded and block_state is not None else block_state
            )
        found.append(hidden)
        return self.norm(x), LanguageModelState(tuple(after)) if kept else None

    def _before(self, parts: list[StateLayer], x: Tensor) -> LanguageModelState | None:
        """What the cache holds, for the rows of x."""
        if not parts or not parts[0].length:
            return None
        states: Any = tuple(part.state for part in parts)
        state = LanguageModelState(states)
        if state.tensors() and (n := len(state)) != len(x):
            check.fail("past_key_values", f"a cache of {len(x)} rows", f"{n} rows")
        return state


def _kept(parts: list[StateLayer], state: Any, places: Places | None, y: Tensor) -> Tensor:
    """Put into the cache what a call found; its outputs y [B, T, dim], at padding the last
    token's."""
    first = parts[0]
    if places is not None:
        y = held(y, places.own, first.last)
    for part, block_state in zip(parts, state.blocks, strict=True):
        part.state, part.length = block_state, part.length + y.shape[1]
        if places is not None:
            part.real, part.offset = places.real, places.offset
    if y.shape[1]:
        first.last = y[:, -1].detach().clone()
    return y


def _placed(h: Tensor, places: Places | None, x: Tensor) -> Tensor:
    """What a block was given of padded rows, as they are."""
    padding = None if places is None else places.padding
    if padding is None:
        return h
    return padding.padded(h, x.shape[:2]) if len(padding.index) else torch.zeros_like(x)


class AtlasForCausalLM(AtlasPreTrainedModel, GenerationMixin):
    """AtlasModel and a head; `generate`, Trainer, PEFT and pipelines take it as any other model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__(config)
        self.model = AtlasModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        start_widths(self.lm_head, config.hidden_size)
        self.post_init()

    def init_continuous_batching(self, *unused: Any, **unused_too: Any) -> Any:
        """Raises ValueError: the pages of `generate_batch` hold keys and values."""
        check.fail(
            "generate_batch", "a model of keys and values (generate takes batches)", "states"
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """As AtlasModel; logits [B, T, V] of the token after each.

        labels: int [B, T], the same tokens (-100: none): the loss is of every next one, and in
        training the balance loss of mixtures of experts is added to it.
        logits_to_keep: only of so many last tokens. options: of transformers' loss
        (num_items_in_batch).
        """
        if self.training:
            balance_loss(self)  # that of a forward whose loss nobody asked for
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            return_dict=True,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options
            )
            if self.training and torch.is_grad_enabled():
                loss = self._balanced(loss, labels, options.get("num_items_in_batch"))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _balanced(self, loss: Tensor, labels: Tensor, items: Any) -> Tensor:
        """The loss with that of mixtures of experts; items: tokens of all micro-batches, of which
        the loss is a share, or None."""
        found = balance_loss(self)
        if found is None:
            weighed = any(
                isinstance(m, MixtureOfExperts) and m.config.balance for m in self.modules()
            )
            if weighed and bool((labels != -100).any()):
                wanted = "use_reentrant=False with gradient checkpointing, or balance=0"
                check.fail("balance", wanted, "experts whose forward recorded no gradient")
            return loss
        share = 1 if items is None else (labels[:, 1:] != -100).sum() / items
        return loss + share * found[0].to(loss.device)


AutoConfig.register("atlas", AtlasConfig, exist_ok=True)
AutoModel.register(AtlasConfig, AtlasModel, exist_ok=True)
AutoModelForCausalLM.register(AtlasConfig, AtlasForCausalLM, exist_ok=True)
