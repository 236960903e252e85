"""``snows-hf bench``"""

from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..jobs.request import check_bench
from .command import Call, with_options
from .options import Device, Model, Revision
from .sink import Sink


@with_options()
def bench(
    call: Call,
    model: Model,
    batch_sizes: Annotated[str, typer.Option(help="Numbers of images, with commas.")] = "1,4,16,64,256",
    dense: Annotated[
        str | None, typer.Option(help="The model that a smaller one was made of: the two are timed in turns.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float16, bfloat16; or float32, with --dense.", show_default="float16, or float32"),
    ] = None,
    device: Device = "auto",
    revision: Revision = None,
) -> None:
    """Time a 2:4 checkpoint with dense and with sparse kernels, or (--dense) a smaller model beside the dense one.

    Exit code 0 also where there are no such kernels.
    """
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        raise ConfigError(f"Batch sizes {batch_sizes!r}: expected numbers with commas, as in 1,16,256.") from None
    dtype = dtype or ("float16" if dense is None else "float32")
    check_bench(sizes, dtype, smaller=dense is not None)
    given: dict[str, Any] = {"source": model, "batch_sizes": sizes, "dtype": dtype}

    from ..jobs.bench import bench as job

    result = call.run(job, **given)
    (show if dense is None else show_smaller)(call.sink, result)
    call.sink.json(result)


def show_smaller(sink: Sink, result: dict[str, Any]) -> None:
    """The figures of a smaller model beside the dense one's."""
    parameters = result["parameters"]
    columns = {"batch": "{batch}", "dense (ms)": "{dense_ms:.1f}", "smaller (ms)": "{smaller_ms:.1f}"}
    title = f"{result['source']} in {result['dtype']} on {result['device']}, {result['threads']} threads"
    sink.table(columns | {"ratio": "{ratio:.2f} ({least:.2f} to {most:.2f})"}, result["batches"], title)
    sink.text(f"{parameters['dense']:,} → {parameters['smaller']:,} parameters.")


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
        {
            "batch": "{batch}",
            "dense (ms)": lambda row: row.get("failed") or f"{row['dense_ms']:.3f}",
            "sparse (ms)": "{sparse_ms:.3f}",
            "dense (images/s)": "{dense_images_per_s:.0f}",
            "sparse (images/s)": "{sparse_images_per_s:.0f}",
            "ratio": "{ratio:.2f}",
        },
        result["batches"],
        f"{result['source']} in {result['dtype']} on {result['device']}",
    )
    for row in result["batches"]:
        ratio = row.get("ratio", 0.0)
        verdict = f"{ratio:.2f} times as fast" if ratio > 1 else f"SLOWER ({ratio:.2f} times)"
        sink.text(f"Batch {row['batch']}: {row.get('failed') or f'sparse is {verdict}'}.")
    if not result["layers_batch"]:
        sink.text("Single layers were not measured: out of memory. Give smaller --batch-sizes.")
        return
    sink.table(
        {
            "layer": "{name}",
            "shape": lambda row: "x".join(map(str, row["shape"])),
            "dense (ms)": "{dense_ms:.3f}",
            "sparse (ms)": "{sparse_ms:.3f}",
            "ratio": "{ratio:.2f}",
        },
        result["layers"],
        f"Layers at batch {result['layers_batch']}",
    )
    gained = [row["name"] for row in result["layers"] if row["ratio"] > 1]
    sink.text(f"{len(gained)} of {able} sparse layers gained: {', '.join(gained) or 'none'}.")
    sink.text(f"Logits differ by {result['difference']:.2g} of the largest.")
