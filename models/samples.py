"""Print what the embedded decoder writes: ``python models/samples.py "Returns the"``."""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from pyrolora import zoo

PROMPTS = (
    "Returns the",
    "The number of",
    "If the matrix is not",
    "Parameters ----------",
    "The old man looked",
    "We, the people",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--tokens", type=int, default=40, help="at most that many new ones")
    parser.add_argument("--top-p", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(zoo.folder("decoder"))
    network = AutoModelForCausalLM.from_pretrained(zoo.folder("decoder")).eval()
    sampling = {"do_sample": True, "top_k": 0, "top_p": options.top_p}
    for title, decoding in {"Greedy": {"do_sample": False}, "Sampled": sampling}.items():
        print(f"{title}:\n")
        for number, prompt in enumerate(options.prompts):
            set_seed(options.seed + number)
            inputs = tokenizer(prompt, return_tensors="pt")
            ids = network.generate(**inputs, **decoding, max_new_tokens=options.tokens)[0]
            end = "" if ids[-1] == tokenizer.eos_token_id else " ..."
            text = tokenizer.decode(ids, skip_special_tokens=True)
            print(f"- **{prompt}**{text.removeprefix(prompt)}{end}")
        print()


if __name__ == "__main__":
    main()
