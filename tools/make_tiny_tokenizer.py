"""Train the byte-level BPE tokenizer that the tiny models share and that ships with the package.

    python tools/make_tiny_tokenizer.py --output mmseg_llm/assets/tiny_tokenizer

The corpus is made here: expressions of the synthetic world, the prompts of the heads, the system messages of the InternVL family
and the English prose of this package's own docstrings. Seeded, so that the same versions write the same file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import mmseg_llm
from mmseg_llm.backbones.chat import TEMPLATES
from mmseg_llm.data.synthetic import LEVELS, make_scene
from mmseg_llm.heads.mask_decoder.prompts import OFFICIAL, Prompts

CONTROL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
]


def corpus(scenes_per_level: int) -> Iterator[str]:
    """Texts in the proportion in which models will meet them."""
    for level in LEVELS:
        for index in range(scenes_per_level):
            for expression in make_scene(level, seed=1, index=index).expressions:
                yield expression.text
    for prompts in (Prompts(), OFFICIAL):
        for _ in range(200):
            yield from ("\n" + question.replace("{x}", "the") for question in prompts.questions)
            yield from (f"{answer.start} {answer.part.replace('{c}', 'the')}" for answer in prompts.answers)
    for template in TEMPLATES.values():
        for _ in range(50):
            yield f"system\n{template.system}\nuser\n\nassistant\n"
    yield from (f"{number} {number / 10:.1f} {number / 100:.2f}" for number in range(1000))
    for path in sorted(Path(mmseg_llm.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                yield ast.get_docstring(node) or ""


def main(
    *, output: Path = Path("mmseg_llm/assets/tiny_tokenizer"), vocabulary: int = 1024, scenes_per_level: int = 300
) -> None:
    """Train and save.

    Args:
        output: folder to write.
        vocabulary: tokens, control tokens included.
        scenes_per_level: synthetic scenes whose expressions are read.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in CONTROL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(scenes_per_level), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    fast.save_pretrained(output)
    print(f"{output}: {len(fast)} tokens")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main, as_positional=False)
