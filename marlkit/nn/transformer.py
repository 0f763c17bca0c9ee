"""The encoder and the decoder of the multi-agent transformer (Wen et al. 2022, arXiv:2205.14953); a token is an agent.

Normalisation follows each residual sum. There is no dropout and no embedding of positions: agents are distinguished by a one-hot
identity appended to their observation. Weights start orthogonal with gain sqrt(2) before a GELU and 0.01 elsewhere; biases start
at zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marlkit.errors import OptionError
from marlkit.spec import TeamSpec

BEFORE_GELU = math.sqrt(2)
ELSEWHERE = 0.01

AttentionCache = dict[nn.Module, tuple[Tensor, Tensor]]
"""Keys and values ``[*, heads, n, E / heads]`` of the tokens so far, by attention: the state of a token-by-token pass."""


def linear(inputs: int, outputs: int, *, gain: float, bias: bool = True) -> nn.Linear:
    """An affine map with orthogonal weights of gain ``gain`` and zero bias."""
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.orthogonal_(layer.weight, gain)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def multilayer_perceptron(width: int) -> nn.Sequential:
    """``W_2 GELU(W_1 x)`` with ``width`` inputs, hidden units and outputs."""
    return nn.Sequential(linear(width, width, gain=BEFORE_GELU), nn.GELU(), linear(width, width, gain=ELSEWHERE))


class Attention(nn.Module):
    """``W_o [softmax(q_h k_h^T / sqrt(d)) v_h]_h`` with heads ``h`` of ``d = width / heads`` features.

    Args:
        width: features of a token.
        heads: number of heads; divides ``width``.

    Raises:
        OptionError: ``heads`` does not divide ``width``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise OptionError("heads", f"must divide embedding={width}, got {heads}")
        self.heads = heads
        self.query, self.key, self.value, self.output = (linear(width, width, gain=ELSEWHERE) for _ in range(4))

    def forward(self, query: Tensor, source: Tensor, *, causal: bool = False, memory: AttentionCache | None = None) -> Tensor:
        """Attention of the tokens of ``query`` over the tokens of ``source``.

        Args:
            query: ``[*, n, E]``.
            source: ``[*, n, E]``.
            causal: whether token i attends to tokens j <= i only.
            memory: keys and values of earlier tokens, which are attended to as well; those of ``source`` are added.

        Returns:
            ``[*, n, E]``.
        """
        queries, keys, values = self._split(self.query(query)), self._split(self.key(source)), self._split(self.value(source))
        if memory is not None:
            if self in memory:
                before = memory[self]
                keys, values = torch.cat([before[0], keys], -2), torch.cat([before[1], values], -2)
            memory[self] = (keys, values)
        gathered = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
        return self.output(gathered.transpose(-2, -3).flatten(-2))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(-2, -3)


class EncoderBlock(nn.Module):
    """``x <- LN(x + attention(x))``, ``x <- LN(x + MLP(x))``; every agent attends to every other.

    Args:
        width: features of a token.
        heads: number of attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.perceptron = multilayer_perceptron(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """``[*, N, E] -> [*, N, E]``."""
        tokens = self.norms[0](tokens + self.attention(tokens, tokens))
        return self.norms[1](tokens + self.perceptron(tokens))


class DecoderBlock(nn.Module):
    """Agent i attends to the actions of the agents before it, with its encoding as the query.

    ``y <- LN(y + attention(y))``, ``y <- LN(e + attention(query=e, source=y))``, ``y <- LN(y + MLP(y))``, both attentions causal;
    the residual of the second is the encoding ``e``.

    Args:
        width: features of a token.
        heads: number of attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.among_actions = Attention(width, heads)
        self.from_encoding = Attention(width, heads)
        self.perceptron = multilayer_perceptron(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, tokens: Tensor, encoding: Tensor, memory: AttentionCache | None = None) -> Tensor:
        """``[*, n, E]`` and ``[*, n, E] -> [*, n, E]``: all tokens at once, or the next one if there is a ``memory``."""
        # The next token attends to every token in memory: no mask is needed.
        causal = memory is None
        tokens = self.norms[0](tokens + self.among_actions(tokens, tokens, causal=causal, memory=memory))
        tokens = self.norms[1](encoding + self.from_encoding(encoding, tokens, causal=causal, memory=memory))
        return self.norms[2](tokens + self.perceptron(tokens))


class ObservationEncoder(nn.Module):
    """``e = blocks(LN(GELU(W LN([o_i, id_i]))))``: features of each agent from the observations of all.

    Args:
        spec: the team.
        embedding: features E of a token.
        blocks: number of encoder blocks.
        heads: number of attention heads.
        agent_id: whether a one-hot identity is appended to the observation.
    """

    identity: Tensor

    def __init__(self, spec: TeamSpec, *, embedding: int, blocks: int, heads: int, agent_id: bool) -> None:
        super().__init__()
        has_identity = agent_id and spec.n_agents > 1
        self.register_buffer("identity", torch.eye(spec.n_agents, spec.n_agents if has_identity else 0), persistent=False)
        inputs = spec.observation + self.identity.shape[1]
        # Layer normalisation of a single feature is always zero.
        self.normalise = nn.LayerNorm(inputs) if inputs > 1 else nn.Identity()
        self.embed = nn.Sequential(linear(inputs, embedding, gain=BEFORE_GELU), nn.GELU(), nn.LayerNorm(embedding))
        self.blocks = nn.ModuleList(EncoderBlock(embedding, heads) for _ in range(blocks))

    def forward(self, observation: Tensor) -> Tensor:
        """``[*, N, O] -> [*, N, E]``."""
        identity = self.identity.expand(*observation.shape[:-2], -1, -1)
        tokens = self.embed(self.normalise(torch.cat([observation, identity], -1)))
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class ActionDecoder(nn.Module):
    """``f_i(e_1..e_i, a_1..a_(i-1))`` for every agent i: token i is the action of the agent before it.

    Args:
        inputs: features of an action token.
        outputs: output features per agent.
        bias: whether the embedding of an action has a bias.
        embedding: features E of a token.
        blocks: number of decoder blocks.
        heads: number of attention heads.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, embedding: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(linear(inputs, embedding, gain=BEFORE_GELU, bias=bias), nn.GELU(), nn.LayerNorm(embedding))
        self.blocks = nn.ModuleList(DecoderBlock(embedding, heads) for _ in range(blocks))
        self.head = nn.Sequential(
            linear(embedding, embedding, gain=BEFORE_GELU),
            nn.GELU(),
            nn.LayerNorm(embedding),
            linear(embedding, outputs, gain=ELSEWHERE),
        )

    def forward(self, tokens: Tensor, encoding: Tensor, memory: AttentionCache | None = None) -> Tensor:
        """Outputs ``[*, n, outputs]`` for action tokens ``[*, n, inputs]`` and encodings ``[*, n, E]``.

        Without ``memory`` these are all agents; with it, the next agent (n = 1) after those in memory.
        """
        tokens = self.embed(tokens)
        for block in self.blocks:
            tokens = block(tokens, encoding, memory)
        return self.head(tokens)
