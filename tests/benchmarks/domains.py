"""KL divergence of sizes of an artifact from its base model, on every domain of text: one table.

    python tests/benchmarks/domains.py FOLDER --ranks 0.8 0.6 --bytes 0.5 0.42 0.37 --windows 16

FOLDER is an artifact. The first domain, `--data`, should be the text that it was calibrated on. All domains are read in windows of the
same length. The last line is the highest KL of a domain relative to that of the first one, over all sizes.
"""

import argparse
import time
from pathlib import Path

from acip.artifact.artifact import Artifact
from acip.evaluate import CurveSetup, Text, trade_off
from acip.evaluate.domains import CHAT, CONTEXT, EVERY_DOMAIN, chat_windows, text_windows
from acip.evaluate.measurement import Subject
from acip.sizing.budget import Budget, is_coded
from acip.sizing.domains import DOMAINS, domain_name, worst_domain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", nargs="*", type=float, default=[0.8, 0.6])
    parser.add_argument("--bytes", nargs="*", type=float, default=[0.5, 0.42, 0.37])
    parser.add_argument("--data", default="package:wikipedia")
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    began = time.monotonic()
    artifact = Artifact.open(args.folder)
    any_size, tokenizer = artifact.load(), artifact.tokenizer()
    domains = {
        domain_name(source): text_windows(source, tokenizer, CONTEXT, args.windows, [args.data])
        for source in EVERY_DOMAIN
        if source not in (CHAT, args.data)
    }
    domains[CHAT] = chat_windows(Subject(any_size.model, tokenizer, any_size), CONTEXT, args.windows)
    text = Text(args.data, "spread", CONTEXT, args.windows)
    sizes = [1.0, *args.ranks, *(Budget(size, "bytes") for size in args.bytes)]
    setup = CurveSetup(text.tokens(tokenizer), text.source, artifact.recipe.stop_ratio, text.protocol, domains=domains)
    rows = trade_off(any_size, sizes, setup)
    names = list(rows[0][DOMAINS])
    print(f"| size | {' | '.join(f'{name}: KL, same top, x ppl' for name in names)} | worst / {names[0]} |")
    print("|---|" + "---|" * (len(names) + 1))
    ratios = []
    for row in rows[1:]:
        worst = worst_domain(row)
        assert worst is not None and worst.times is not None
        ratios.append(worst.times)
        cells = (
            f"{each['kl_nats']:.4f}, {each['same_top_share']:.1%}, {each['ppl'] / each['base_ppl']:.2f}" for each in row[DOMAINS].values()
        )
        kind = "of the bytes" if is_coded(row) else "of the numbers (ranks)"
        print(f"| {row['asked']:g} {kind} | {' | '.join(cells)} | {worst.times:.2f} ({worst.name}) |")
    print("tokens:", ", ".join(f"{name} {each['tokens']:,}, base ppl {each['base_ppl']:.2f}" for name, each in rows[0][DOMAINS].items()))
    print(f"{time.monotonic() - began:.0f} s")
    print(f"highest ratio: {max(ratios):.2f}")


if __name__ == "__main__":
    main()
