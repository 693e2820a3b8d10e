"""What ``self.log(..., on_epoch=True)`` has summed up in an epoch, which Lightning does not keep in checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from torch_meanfield._torch import logged_values

OPTIONS = ("prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "metric_attribute")


def sums(trainer: Trainer) -> list[dict[str, Any]]:
    """What training has logged since the epoch began, each value with the options it was logged under.

    Tensors only: torchmetrics objects are modules, which keep their own state.
    """
    found = []
    for metric in logged_values(trainer).values():
        if metric.is_tensor and metric.meta.on_epoch and not metric.has_reset:
            meta = metric.meta
            found.append(
                {
                    "fx": meta.fx,
                    "name": meta.name,
                    "reduce_fx": meta.reduce_fx.__name__,
                    "sync_dist": meta.sync.should,
                    "rank_zero_only": meta.sync.rank_zero_only,
                    **{option: getattr(meta, option) for option in OPTIONS},
                    "value": metric.value.detach().cpu().clone(),
                    "count": metric.cumulated_batch_size.cpu().clone() if meta.is_mean_reduction else None,
                }
            )
    return found


def give_back(trainer: Trainer, saved: list[dict[str, Any]]) -> None:
    """Put back what :func:`sums` found, ahead of what has been logged since then.

    Lightning forgets what is there when the first batch logs something, so this comes after that batch.
    """
    results, device = logged_values(trainer), trainer.strategy.root_device
    for entry in saved:
        value, count = entry["value"].to(device), entry["count"]
        metric = results.get(f"{entry['fx']}.{entry['name']}")
        if metric is None or metric.has_reset:
            options = {key: entry[key] for key in entry.keys() - {"value", "count"}}
            results.log(value=value, **options, batch_size=1, sync_dist_fn=trainer.strategy.reduce)
            metric = results[f"{entry['fx']}.{entry['name']}"]
            metric.value = value
            if count is not None:
                metric.cumulated_batch_size = count.to(device)
            continue
        if metric.meta.is_max_reduction or metric.meta.is_min_reduction:
            metric.value = metric.meta.reduce_fx(value, metric.value)
        else:
            metric.value = value + metric.value
        if count is not None:
            metric.cumulated_batch_size = count.to(device) + metric.cumulated_batch_size
