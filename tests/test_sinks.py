"""TensorBoard, JSON lines, console, memory: what is written can be read back, and nothing breaks the run."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tensorboardX
from builders import alert, snapshot, tensors
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

from gradwatch import ConfigurationError, ConsoleSink, JSONLSink, MemorySink, TensorBoardSink
from gradwatch.records import Cause, Intervention
from gradwatch.schema import STATISTICS, alert_table
from gradwatch.sinks.blocks import MAX_BLOCKS, blocks
from gradwatch.sinks.event_file import _masked_checksum, accelerate

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)


def events(folder):
    files = sorted(folder.glob("events.out.tfevents.*"))
    return [event for file in files for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]


def values(folder):
    return {value.tag: value for event in events(folder) for value in event.summary.value}


def written(folder, steps, *, log_every=10, **changes):
    sink = TensorBoardSink(folder, log_every=log_every)
    for step in range(steps):
        sink.write(snapshot(step, **changes), (), ())
    sink.close()


def test_one_event_a_logged_step_holds_everything(tmp_path):
    written(tmp_path, 25)

    assert [event.step for event in events(tmp_path)] == [0, 10, 20]
    tags = {value.tag for event in events(tmp_path) for value in event.summary.value}
    assert "gradwatch/global_norm" in tags
    assert sum(tag.startswith("gradwatch/stats/") for tag in tags) == len(STATISTICS) - 2  # two were not measured


def test_the_vectors_come_back_as_they_were_and_are_visible_to_readers(tmp_path):
    norm = np.array([1e-12, 2.0, np.nan, 3e9])
    written(tmp_path, 1, norm=norm)

    (tag,) = [tag for tag in values(tmp_path) if tag.endswith("/norm")]
    value = values(tmp_path)[tag]

    np.testing.assert_array_equal(make_ndarray(value.tensor), norm.astype(np.float32))
    assert value.metadata.data_class == DATA_CLASS_TENSOR
    assert value.metadata.plugin_data.plugin_name == "gradwatch"
    schema = json.loads(make_ndarray(values(tmp_path)[f"gradwatch/schema/{tag.split('/')[2]}"].tensor)[0])
    assert tuple(schema["tensors"]) == tensors().names


def test_scalars_are_read_by_tensorboards_own_accumulator(tmp_path):
    written(tmp_path, 11, loss=2.5, loss_scale=1024.0, clipped_norm=0.5, clip_coefficient=0.5)

    accumulator = EventAccumulator(str(tmp_path)).Reload()

    assert {"gradwatch/loss", "gradwatch/loss_scale", "gradwatch/clip_coefficient", "gradwatch/learning_rate"} <= set(
        accumulator.Tags()["tensors"] + accumulator.Tags()["scalars"]
    )


def test_a_spike_between_two_logged_steps_is_not_lost(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for step in range(21):
        sink.write(snapshot(step, global_norm=99.0 if step == 13 else 1.0), (), ())
    sink.close()

    largest = [
        value.tensor.float_val[0] if value.tensor.float_val else value.simple_value
        for event in events(tmp_path)
        for value in event.summary.value
        if value.tag == "gradwatch/global_norm_max"
    ]

    assert largest == [1.0, 1.0, 99.0]


@pytest.mark.parametrize("number", [4, 300, 2000])
def test_the_number_of_scalar_tags_does_not_grow_with_the_model(tmp_path, number):
    names = tuple(f"model.layers.{i}.attention.weight" for i in range(number))
    written(tmp_path, 1, of=tensors(names=names))

    scalars = [tag for tag, value in values(tmp_path).items() if value.metadata.plugin_data.plugin_name == "scalars"]

    assert len(scalars) <= 100


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["a.x.1", "a.x.2", "b.y"], ["a.x.1", "a.x.2", "b.y"]),
        (["", "1"], ["(root)", "1"]),
        ([f"body.{i}.{j}" for i in range(20) for j in range(9)], [f"body.{i}" for i in range(20) for _ in range(9)]),
    ],
)
def test_blocks_are_as_fine_as_the_page_allows(layers, expected):
    assert list(blocks(tensors(names=[f"{x}.w" for x in layers], layers=tuple(layers)))) == expected


def test_very_many_blocks_are_joined_with_their_neighbours():
    layers = tuple(f"layer{i}" for i in range(1000))

    made = blocks(tensors(names=layers, layers=layers))

    assert len(set(made)) <= MAX_BLOCKS
    assert made[0] == "layer0..."


def test_several_optimizers_have_tags_of_their_own(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for name in ("g", "d"):
        sink.write(snapshot(0, optimizer=name, several_lanes=True), (), ())
    sink.close()

    assert {"gradwatch/g/global_norm", "gradwatch/d/global_norm"} <= set(values(tmp_path))


def test_alerts_are_written_at_once_as_records_and_as_text(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(snapshot(3), (alert(), alert(symptom="other")), ())
    sink.write(snapshot(4), (alert(change="resolved", resolved=4),), ())
    sink.close()

    first, second = events(tmp_path)
    by_tag = {value.tag: value for value in first.summary.value}
    records = [json.loads(record) for record in make_ndarray(by_tag["gradwatch/alerts"].tensor)]
    assert [record["symptom"] for record in records] == ["profile_down", "other"]
    assert by_tag["gradwatch/alerts"].metadata.plugin_data.plugin_name == "gradwatch_alerts"
    assert "| **vanishing** |" in make_ndarray(by_tag["gradwatch/alerts/text_summary"].tensor)[0].decode()
    counts = [value for event in (first, second) for value in event.summary.value if value.tag.endswith("open_alerts")]
    assert [(v.tensor.float_val or [v.simple_value])[0] for v in counts] == [2.0, 1.0]


def test_a_critical_alert_is_on_disk_before_the_next_step(tmp_path):
    sink = TensorBoardSink(tmp_path)

    sink.write(snapshot(0), (alert(severity="critical"),), ())

    assert "gradwatch/alerts" in values(tmp_path)
    sink.close()


def test_the_histogram_counts_all_elements_by_their_octave(tmp_path):
    octaves = np.zeros((4, 64))
    octaves[:, 40] = 10.0
    octaves[0, 42] = 30.0
    written(tmp_path, 1, histogram=octaves)

    (value,) = [value for tag, value in values(tmp_path).items() if tag.endswith("log2_gradient")]

    buckets = make_ndarray(value.tensor) if value.HasField("tensor") else None
    assert buckets is not None
    assert buckets[:, 2].sum() == pytest.approx(4 * 64)
    assert buckets[:, 0].min() >= 40 - 48


@pytest.mark.parametrize("make", [SummaryWriter, tensorboardX.SummaryWriter], ids=["torch", "tensorboardX"])
def test_a_writer_that_the_user_has_is_shared_and_stays_open(tmp_path, make):
    writer = make(str(tmp_path))
    writer.add_scalar("loss", 1.0, 0)
    sink = TensorBoardSink(writer)

    sink.write(snapshot(0), (alert(),), ())
    sink.close()
    writer.add_scalar("loss", 2.0, 1)
    writer.close()

    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    assert {"loss", "gradwatch/global_norm", "gradwatch/alerts"} <= set(values(tmp_path))
    assert [event.step for event in events(tmp_path)] == [0, 0, 1]


@pytest.mark.parametrize("make", [SummaryWriter, tensorboardX.SummaryWriter], ids=["torch", "tensorboardX"])
def test_a_writer_that_was_closed_is_an_error_and_no_second_file(tmp_path, make):
    writer = make(str(tmp_path))
    sink = TensorBoardSink(writer)
    writer.close()

    with pytest.raises(RuntimeError, match="was closed"):
        sink.write(snapshot(0), (), ())
    sink.close()

    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_a_dummy_writer_of_another_rank_is_left_alone():
    class Dummy:
        def _get_file_writer(self):
            return None

    sink = TensorBoardSink(Dummy())
    sink.write(snapshot(0), (alert(severity="critical"),), ())
    sink.close()


def test_a_resumed_run_goes_on_in_the_same_folder(tmp_path, caplog):
    written(tmp_path, 11)
    written(tmp_path, 1)

    assert len(list(tmp_path.glob("events.out.tfevents.*.gradwatch"))) == 2
    assert caplog.records == []


def test_beside_another_live_writer_our_file_has_a_folder_of_its_own(tmp_path, caplog):
    other = SummaryWriter(str(tmp_path))

    with caplog.at_level(logging.WARNING, logger="gradwatch"):
        written(tmp_path, 1)
    other.close()

    assert events(tmp_path / "gradwatch")
    assert len(caplog.records) == 1
    assert "Pass that SummaryWriter as log_dir" in caplog.records[0].getMessage()


def test_an_event_file_of_a_process_that_is_gone_is_nobodys(tmp_path):
    (tmp_path / f"events.out.tfevents.1.{socket.gethostname()}.999999999.0").touch()
    (tmp_path / "events.out.tfevents.1.elsewhere.1.0").touch()

    written(tmp_path, 1)

    assert list(tmp_path.glob("*.gradwatch"))


def test_a_deleted_log_directory_raises_out_of_write_and_close_returns(tmp_path):
    folder = tmp_path / "run"
    sink = TensorBoardSink(folder, log_every=1)
    sink.write(snapshot(0), (), ())
    sink.flush()
    shutil.rmtree(folder)

    with pytest.raises(OSError, match=r"."):
        for step in range(1, 500):
            sink.write(snapshot(step), (), ())
            sink.flush()
    with suppress(OSError):
        sink.close()


@pytest.mark.parametrize("make", [TensorBoardSink, JSONLSink])
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, make):
    (tmp_path / "file").write_text("x")

    with pytest.raises(ConfigurationError, match="cannot write"):
        make(tmp_path / "file" / "deeper")


@pytest.mark.parametrize("make", [TensorBoardSink, JSONLSink])
def test_a_cadence_below_one_is_refused(tmp_path, make):
    with pytest.raises(ConfigurationError, match="log_every must be a whole number of at least 1, got 0"):
        make(tmp_path / "x", log_every=0)


def test_what_is_neither_a_folder_nor_a_writer_is_refused():
    with pytest.raises(ConfigurationError, match=r"log_dir must be a folder or a SummaryWriter, got builtins\.int"):
        TensorBoardSink(3)


def test_a_forked_child_writes_nothing_and_does_not_hang(tmp_path):
    sink = TensorBoardSink(tmp_path, log_every=1)

    child = os.fork()
    if child == 0:
        for step in range(300):
            sink.write(snapshot(step), (), ())
        sink.flush()
        sink.close()
        os._exit(0)
    os.waitpid(child, 0)
    sink.write(snapshot(0), (), ())
    sink.close()

    assert [event.step for event in events(tmp_path)] == [0]


@given(st.binary(max_size=500))
def test_the_fast_checksum_is_the_stock_one(data):
    assert int.from_bytes(_masked_checksum(data), "little") == masked_crc32c(data)


def test_a_writer_with_another_inside_is_left_as_it_is():
    assert not accelerate(object())


# -- JSON lines --------------------------------------------------------------------------------------------------


def lines(path):
    def strict(constant):
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=strict) for line in path.read_text().splitlines()]


def test_steps_and_alerts_are_one_strict_json_object_a_line(tmp_path):
    path = tmp_path / "deep" / "run.jsonl"
    sink = JSONLSink(path)
    for step in range(12):
        norm = np.array([1.23456789, np.nan, np.inf, 0.0])
        changed = (alert(causes=(Cause(name="depth", confidence=0.5, evidence="e", remedy="r"),)),) if step == 3 else ()
        sink.write(snapshot(step, norm=norm, loss=float("nan")), changed, ())
    sink.close()

    found = lines(path)

    assert [line["type"] for line in found] == ["schema", "step", "step", "alert", "step"]
    assert [line.get("step") for line in found] == [None, 0, 3, 12, 10]
    assert found[1]["norm"] == [1.234568, None, None, 0.0]
    assert found[1]["loss"] is None
    assert found[1]["mean"] is None
    assert found[1]["schema"] == found[0]["id"]
    assert found[3]["cause"] == "depth"
    assert {line.get("v") for line in found} == {1}


def test_a_second_run_appends(tmp_path):
    for _ in range(2):
        sink = JSONLSink(tmp_path / "a.jsonl")
        sink.write(snapshot(0), (), (INTERVENTION,))
        sink.close()

    assert [line["type"] for line in lines(tmp_path / "a.jsonl")] == ["schema", "step", "intervention"] * 2


INTERVENTION = Intervention(step=0, optimizer="", kind="backoff", reason="because", before=1.0, after=0.5)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_raises_out_of_write():
    sink = JSONLSink("/dev/full")

    with pytest.raises(OSError, match="No space left"):
        sink.write(snapshot(0), (alert(),), ())
    with suppress(OSError):
        sink.close()


# -- console -----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def printed(*alerts, stream=None, **changes):
    stream = io.StringIO() if stream is None else stream
    sink = ConsoleSink(stream)
    sink.write(snapshot(0, **changes), alerts, ())
    sink.flush()
    sink.close()
    return stream.getvalue()


def test_an_alert_is_one_readable_block():
    layers = tuple(f"layers.{i}" for i in range(7))

    assert printed(alert(layers=layers)).splitlines() == [
        "┃ gradwatch · vanishing (warning) · step 12, since step 3",
        "┃ The gradient falls by 5.5 decades.",
        "┃ layers: layers.0, layers.1, layers.2, layers.3 and 3 more",
        "┃ reading 5.5, threshold 2.25",
    ]


def test_cause_and_remedy_are_shown_where_there_are_some():
    cause = Cause(name="depth", confidence=0.9, evidence="Twelve layers.", remedy="Use six.")

    text = printed(alert(causes=(cause,)))

    assert "cause: depth. Twelve layers." in text
    assert "remedy: Use six." in text


def test_the_end_and_the_worsening_of_an_alert_are_told_and_updates_are_not():
    assert "vanishing is over · step 12" in printed(alert(change="resolved", resolved=12))
    assert "worse than before" in printed(alert(change="escalated"))
    assert printed(alert(change="updated")) == ""
    assert printed(alert(severity="info")) == ""


def test_the_optimizer_is_named_where_there_are_several():
    assert "optimizer 'g'" in printed(alert(optimizer="g"), several_lanes=True)


def test_interventions_are_told():
    stream = io.StringIO()

    ConsoleSink(stream).write(snapshot(0), (), (INTERVENTION,))

    assert stream.getvalue() == "gradwatch: backoff at step 0: because\n"


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[33;1m" in printed(alert(), stream=Terminal())
    assert "\033[" not in printed(alert())

    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033[33" not in printed(alert(), stream=Terminal())


def test_a_block_begins_on_a_fresh_line_beside_a_progress_bar():
    assert printed(alert(), stream=Terminal()).startswith("\r\033[K")


def test_a_stream_without_unicode_gets_plain_text():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")

    ConsoleSink(stream).write(snapshot(0), (alert(message="‖Δw‖ × 3"),), ())
    stream.flush()

    assert b"| gradwatch - vanishing" in raw.getvalue()
    assert b"||dw|| x 3" in raw.getvalue()


def test_the_console_speaks_on_standard_error(capsys):
    ConsoleSink().write(snapshot(0), (alert(),), ())

    assert "vanishing" in capsys.readouterr().err


def test_long_messages_are_wrapped():
    text = printed(alert(message="word " * 100))

    assert max(len(line) for line in text.splitlines()) <= 100


# -- memory ------------------------------------------------------------------------------------------------------


def test_memory_keeps_the_newest_snapshots_and_the_newest_record_of_each_alert():
    sink = MemorySink(limit=3)
    for step in range(5):
        sink.write(snapshot(step), (), ())
    sink.write(snapshot(5), (alert(), alert(symptom="other")), (INTERVENTION,))
    sink.write(snapshot(6), (alert(change="resolved", resolved=6),), ())
    sink.flush()
    sink.close()

    assert [s.step for s in sink.snapshots] == [4, 5, 6]
    assert [a.change for a in sink.alerts] == ["resolved", "opened"]
    assert sink.interventions == [INTERVENTION]


def test_pipes_in_a_message_do_not_break_the_table():
    assert "a \\| b" in alert_table([alert(message="a | b", layers=("",) * 7)])
