import pytest
from transformers import AutoConfig

from qlora_core.modeling.context import context_tokens


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama", "max_position_embeddings": 4096}, 4096),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}, 32768),
        ({"model_type": "bloom"}, None),
        ({"model_type": "mamba"}, None),
        (
            {
                "model_type": "qwen2",
                "max_position_embeddings": 32768,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131_072,
        ),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 131_072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131_072,
        ),
    ],
    ids=["plain", "learned positions", "a window", "alibi", "no positions", "yarn", "llama 3"],
)
def test_the_longest_row_of_a_model_follows_its_positions_and_their_scaling(config, expected):
    assert context_tokens(AutoConfig.for_model(**config)) == expected
