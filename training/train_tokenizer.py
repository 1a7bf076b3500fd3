"""A byte-level BPE tokenizer for a model of one's own, with the special-token names of the published ones.

Everything downstream finds ids by name, so a tokenizer of any size will do, as long as the names are there.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def build_tokenizer(texts: Iterable[str], num_codes: int, num_sizes: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains merges on `texts` and lays out the vocabulary: control tokens, image codes, sizes, text.

    Args:
        num_codes: codes of the VQ model.
        num_sizes: largest image side, in size units.
        vocab_size: upper limit for the decoder's vocabulary. Few texts may have fewer merges to learn.

    Returns:
        A tokenizer whose last token is the placeholder `<|image|>`, which lies outside of the decoder's vocabulary:
        that has `len(tokenizer) - 1` ids.
    """
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    special += [f"IMGIMG{str(code).translate(letters)}Z" for code in range(num_codes)]
    special += ["<eoss>", "<racm3:break>", "<reserved08706>", "<reserved08799>"]
    special += [f"<reserved{8800 + size:05d}>" for size in range(1, num_sizes + 1)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special) + len(alphabet):
        raise ValueError(f"vocab_size {vocab_size}: at least {len(special) + len(alphabet)} ids are needed")
    tokenizer = Tokenizer(models.BPE())
    # Digit by digit: else a number's tokens would depend on which numbers are frequent ("11", but "3" "7").
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|image|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
