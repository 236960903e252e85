"""``snows-hf bench``"""

from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..jobs.request import check_bench
from .options import Device, Json, Model, Quiet, Revision
from .sink import Sink, open_sink
from .watch import Watch


def command(
    model: Model,
    batch_sizes: Annotated[str, typer.Option(help="Numbers of images, with commas.")] = "1,4,16,64,256",
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    device: Device = "auto",
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time a 2:4 checkpoint with dense and with sparse kernels. Exit code 0 also where there are no such kernels."""
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        raise ConfigError(f"Batch sizes {batch_sizes!r}: expected numbers with commas, as in 1,16,256.") from None
    check_bench(sizes, dtype)

    from ..jobs.bench import bench

    sink = open_sink(as_json, quiet)
    with Watch(sink) as watch:
        result = bench(model, sizes, dtype, device, revision, **watch.told)
    show(sink, result)
    sink.json(result)


def show(sink: Sink, result: dict[str, Any]) -> None:
    """The figures for people, and in plain words whether it pays."""
    for name, reason in result["dense_layers"].items():
        sink.text(f"Dense: {name}: {reason}.")
    able = len(result["sparse_layers"])
    if not result["supported"]:
        sink.text(f"Not measured: {result['reason']}. The model computes with dense kernels, no faster for its zeros.")
        sink.text(f"By type, shape and pattern {able} of {able + len(result['dense_layers'])} Linear layers qualify.")
        return
    sink.table(
        ["batch", "dense (ms)", "sparse (ms)", "dense (images/s)", "sparse (images/s)", "ratio"],
        [
            (str(row["batch"]), row["failed"], "", "", "", "") if "failed" in row else
            (str(row["batch"]), f"{row['dense_ms']:.3f}", f"{row['sparse_ms']:.3f}",
             f"{row['dense_images_per_s']:.0f}", f"{row['sparse_images_per_s']:.0f}", f"{row['ratio']:.2f}")
            for row in result["batches"]
        ],
        title=f"{result['source']} in {result['dtype']} on {result['device']}",
    )  # fmt: skip
    for row in result["batches"]:
        if "failed" in row:
            sink.text(f"Batch {row['batch']}: {row['failed']}.")
            continue
        verdict = f"{row['ratio']:.2f} times as fast" if row["ratio"] > 1 else f"SLOWER ({row['ratio']:.2f} times)"
        sink.text(f"Batch {row['batch']}: sparse is {verdict}.")
    if not result["layers_batch"]:
        sink.text("Single layers were not measured: out of memory. Give smaller --batch-sizes.")
        return
    sink.table(
        ["layer", "shape", "dense (ms)", "sparse (ms)", "ratio"],
        [
            (row["name"], "x".join(map(str, row["shape"])), f"{row['dense_ms']:.3f}", f"{row['sparse_ms']:.3f}",
             f"{row['ratio']:.2f}")
            for row in result["layers"]
        ],
        title=f"Layers at batch {result['layers_batch']}",
    )  # fmt: skip
    gained = [row["name"] for row in result["layers"] if row["ratio"] > 1]
    sink.text(f"{len(gained)} of {able} sparse layers gained: {', '.join(gained) or 'none'}.")
    sink.text(f"Logits differ by {result['difference']:.2g} of the largest.")
