"""T3, Chatterbox's text-to-speech-token model, as a scriptable module."""

import torch
from torch import Tensor, nn

from vivace.t3.backbone import Backbone
from vivace.t3.conditioning import ConditioningEncoder
from vivace.t3.config import T3Config
from vivace.t3.rotary import rotary_table


class T3(nn.Module):
    """Voice and text in, distribution of the next speech token out.

    A sequence is [voice | text | BOS BOS | speech]. Text and speech carry learned positions of their own segment;
    rotary embedding counts over the whole. With classifier-free guidance a request has a second row whose text is
    replaced by its positions alone. All methods but the constructor can be scripted and take no gradient.

    `tokens` counts the tokens of all rows together; `rows` are the sequences. Floating tensors are of the model's dtype
    unless said otherwise; token ids are int64, lengths int32.
    """

    def __init__(self, config: T3Config):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.num_layers = config.num_layers
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.speaker_embed_size = config.speaker_embed_size
        self.start_speech_token = config.start_speech_token

        self.conditioning = ConditioningEncoder(config)
        self.text_emb = nn.Embedding(config.text_vocab_size, config.hidden_size)
        self.text_pos_emb = nn.Embedding(config.text_positions, config.hidden_size)
        self.speech_emb = nn.Embedding(config.speech_vocab_size, config.hidden_size)
        self.speech_pos_emb = nn.Embedding(config.speech_positions, config.hidden_size)
        self.backbone = Backbone(config)
        self.speech_head = nn.Linear(config.hidden_size, config.speech_vocab_size, bias=False)
        # (2, max_positions, head_dim / 2): cosines, sines. float32 whatever the model's dtype is.
        table = rotary_table(config.max_positions, config.head_dim, config.rope_theta, config.rope_scaling)
        self.register_buffer("rotary_table", table, persistent=False)

    @torch.jit.export
    def encode_voice(self, speaker_emb: Tensor, prompt_tokens: Tensor, emotion: float) -> Tensor:
        """The conditioning prefix of a voice; compute it once and keep it.

        Args:
            speaker_emb: (1, speaker_embed_size) float32, the voice encoder's embedding.
            prompt_tokens: (1, P) speech tokens of the voice's sample, P at least 1.
            emotion: exaggeration, 0.5 is neutral.

        Returns:
            (cond_length, hidden): speaker, resampled prompt, emotion.
        """
        if speaker_emb.dim() != 2 or speaker_emb.size(0) != 1 or speaker_emb.size(1) != self.speaker_embed_size:
            raise ValueError(
                f"vivace.T3.encode_voice: speaker_emb has shape {speaker_emb.shape}, "
                f"expected [1, {self.speaker_embed_size}]"
            )
        if prompt_tokens.dim() != 2 or prompt_tokens.size(0) != 1 or prompt_tokens.size(1) < 1:
            raise ValueError(
                f"vivace.T3.encode_voice: prompt_tokens has shape {prompt_tokens.shape}, expected [1, tokens]"
            )
        prompt = self.speech_embeddings(prompt_tokens[0])
        return self.conditioning(speaker_emb, prompt, emotion)

    @torch.jit.export
    def embed_prompt(self, cond: Tensor, text_tokens: Tensor, drop_text: bool) -> Tensor:
        """The prefill of one row.

        Args:
            cond: (cond_length, hidden) from encode_voice.
            text_tokens: (n,) ids with the start and stop text tokens around them.
            drop_text: the unconditional row of classifier-free guidance: the text's positions without the text.

        Returns:
            (cond_length + n + 2, hidden). The last two are the same, BOS at speech position 0: Chatterbox has it twice.
        """
        length = text_tokens.size(0)
        if length > self.text_pos_emb.weight.size(0):
            raise ValueError(
                f"vivace.T3.embed_prompt: text_tokens has {length} tokens, expected at most "
                f"{self.text_pos_emb.weight.size(0)}"
            )
        text = self.text_pos_emb.weight[:length]
        if not drop_text:
            text = self.text_emb(text_tokens) + text
        bos = self.speech_emb.weight[self.start_speech_token] + self.speech_pos_emb.weight[0]
        return torch.cat([cond, text, bos.expand(2, self.hidden_size)])

    @torch.jit.export
    def new_cache(self, rows: int, capacity: int) -> tuple[Tensor, Tensor]:
        """Keys and values, zeros: two of (layers, rows, capacity, kv_heads, head_dim)."""
        weight = self.speech_emb.weight
        shape = [self.num_layers, rows, capacity, self.num_kv_heads, self.head_dim]
        k_cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        return k_cache, torch.zeros_like(k_cache)

    def forward(
        self,
        x: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: Tensor,
        cache_batch_idx: Tensor,
        cu_seqlens_q: Tensor | None,
        max_seqlen_q: int,
        probes: Tensor | None,
    ) -> Tensor:
        """Runs the decoder over new tokens of each row and appends them to the cache.

        Args:
            x: (tokens, hidden), the rows one after the other.
            k_cache, v_cache: from new_cache; written in place.
            cache_seqlens: (rows,) int32, tokens of each row before the call; the caller advances it.
            cache_batch_idx: (rows,) int32, the cache row of each row.
            cu_seqlens_q: (rows + 1,) int32, where each row begins in x; None: one token a row.
            max_seqlen_q: the most tokens of a row in this call; ignored without cu_seqlens_q.
            probes: (alignment heads, rows, probe_rows, capacity) float32 or None: receives the attention probabilities
                of the last probe_rows tokens of each row, for the configuration's alignment_heads.

        Returns:
            (tokens, hidden) after the final norm.
        """
        table = self.rotary_table
        if table.dtype != torch.float32:
            raise ValueError(
                f"vivace.T3: rotary_table is {table.dtype}, expected float32: "
                "convert the dtype of the parameters, not of the buffers"
            )
        return self.backbone(
            x,
            table[0],
            table[1],
            k_cache,
            v_cache,
            cache_seqlens,
            cache_batch_idx,
            cu_seqlens_q,
            max_seqlen_q,
            probes,
        )

    @torch.jit.export
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (rows, hidden) -> (rows, speech_vocab) float32."""
        return self.speech_head(hidden).float()

    @torch.jit.export
    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        row_request: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: Tensor,
        cache_batch_idx: Tensor,
        probes: Tensor | None,
    ) -> Tensor:
        """One token of each request through the model. Device work only: it can be captured in a CUDA graph.

        Args:
            tokens: (requests,) the last speech token of each.
            positions: (requests,) its speech position: i + 1 for the i-th generated token, from 0.
            row_request: (rows,) int64, the request of each row; with guidance a request has two rows.
            k_cache, v_cache, cache_seqlens, cache_batch_idx, probes: as in forward().

        Returns:
            (rows, speech_vocab) float32.
        """
        x = (self.speech_emb(tokens) + self.speech_pos_emb(positions)).index_select(0, row_request)
        return self.logits(self.forward(x, k_cache, v_cache, cache_seqlens, cache_batch_idx, None, 0, probes))

    def speech_embeddings(self, tokens: Tensor) -> Tensor:
        """tokens (n,) at speech positions 0..n-1 -> (n, hidden)."""
        length = tokens.size(0)
        if length > self.speech_pos_emb.weight.size(0):
            raise ValueError(
                f"vivace.T3.encode_voice: prompt_tokens has {length} tokens, expected at most "
                f"{self.speech_pos_emb.weight.size(0)}"
            )
        return self.speech_emb(tokens) + self.speech_pos_emb.weight[:length]
