"""The table of the decode benchmark."""

from __future__ import annotations

from typing import Any


def times(ratio: float | None) -> str:
    """A ratio as the table has it."""
    return "" if ratio is None else f"{ratio:.2f}x"


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Put beside each run how many times the fastest dense one it is, in the same weights and in those as stored."""
    for row in rows:
        for column, kind in (("ratio", row["weights"]), ("ratio_to_stored", "stored")):
            dense = [r["tokens_per_second"] for r in rows if r["weights"] == kind and "sparsity" not in r]
            row[column] = row["tokens_per_second"] / max(dense) if dense else None


def report(title: str, runs: list[dict[str, Any]]) -> str:
    """All runs as a Markdown table, and where their time goes."""
    lines = [
        f"{title}\n",
        "| run | batch | context | tok/s | ms/step | of the best dense in these weights | of the best dense as stored "
        "| GB a step | of peak bandwidth | realised (least, most) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        roofline = "" if r["roofline"] is None else f"{r['roofline']:.0%}"
        low, high = r.get("realised_min_max", (0, 0))
        lines.append(
            f"| {r['run']} | {r['batch']} | {r['context']} | {r['tokens_per_second']:.1f} | {r['ms']:.3f} "
            f"| {times(r['ratio'])} | {times(r['ratio_to_stored'])} | {r['bytes'] / 1e9:.2f} | {roofline} "
            f"| {r.get('sparsity', 0):.3f} ({low:.3f}, {high:.3f}) |"
        )
    for r in runs:
        if "profile" in r:
            p = r["profile"]
            lines.append(
                f"\n{r['run']}, batch {r['batch']}, context {r['context']}: {p['launches']:.0f} launches a token, "
                f"{p['busy_us']:.0f} us in kernels; a block: products on their own {p['product_us_per_block']:.1f} us, "
                f"fused {p['fused_us_per_block']:.1f} us, attention {p['attention_us_per_block']:.1f} us"
            )
            lines += [f"- {name}: {k['launches']:.1f} launches, {k['us']:.1f} us" for name, k in p["kernels"].items()]
    return "\n".join(lines)
