"""What can go wrong, what must come of it, and the tests that show it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
  """Something that can go wrong."""

  name: str
  done: str
  expected: str
  # module.Class.test, of all parameters; without tests, why there are none.
  tests: tuple[str, ...] | str


def _fault(name: str, done: str, expected: str, *tests: str) -> Fault:
  return Fault(name, done, expected, tests)


FAULTS = (
  _fault(
    "F01",
    "SIGKILL at a random moment, 100 times",
    "goes on from the last checkpoint, ends in the same bits",
    "faults.KillTest.test_at_random_moments",
    "faults.KillTest.test_at_a_hundred_random_moments",
  ),
  _fault(
    "F02",
    "SIGKILL at each point of a save: before and within the arrays, before"
    " the manifest, before the name, before and within removing an old one",
    "the older checkpoint is whole, the half one is never read and is gone"
    " at the next start",
    "faults.KillTest.test_at_a_point",
    "faults.KillTest.test_while_arrays_are_written",
  ),
  _fault(
    "F03",
    "ten kills in a row, some before any progress",
    "never backwards, bounded disk",
    "faults.KillTest.test_ten_times_some_before_any_progress",
  ),
  _fault(
    "F04",
    "SIGTERM, SIGINT; a second signal; a save that takes too long",
    "saves and exits 75; at once after the second or the grace period",
    "faults.SignalTest.test_sigterm_saves_and_leaves",
    "faults.SignalTest.test_sigint_too",
    "faults.SignalTest.test_a_second_one_ends_it_at_once",
    "faults.SignalTest.test_what_is_not_saved_in_time_is_left",
  ),
  _fault(
    "F05",
    "SIGTERM while it compiles, saves, evaluates",
    "no hang; 75",
    "faults.SignalTest.test_while_it_compiles",
    "faults.SignalTest.test_while_it_saves",
    "faults.SignalTest.test_while_it_evaluates",
  ),
  _fault(
    "F06",
    "SIGTERM to one of two and of four processes",
    "all save the same step, all exit 75",
    "faults.TwoTest.test_one_is_told_to_leave_and_all_do",
    "faults.FourTest.test_one_is_told_to_leave_and_all_do",
  ),
  _fault(
    "F07",
    "SIGKILL or SIGSTOP of one of two and of four processes, the first or"
    " another; an error in one",
    "all leave within the heartbeat and 5 s and name it; ends in the same bits",
    *(
      f"faults.{case}.{test}"
      for case in ("TwoTest", "FourTest")
      for test in (
        "test_another_is_killed",
        "test_the_first_is_killed",
        "test_another_is_stopped",
        "test_the_first_is_stopped",
        "test_one_fails",
      )
    ),
  ),
  _fault(
    "F08",
    "a process is alive and does nothing",
    "stacks of all threads, who is behind at which step; 124",
    "faults.LoopTest.test_a_hanging_step_is_ended_with_stacks",
    "faults.TwoTest.test_one_hangs",
    "faults.FourTest.test_one_hangs",
  ),
  _fault(
    "F09",
    "one never joins, joins twice, expects another number; port taken",
    "bounded wait, named; 2",
    "processes.MissingTest",
    "cluster.RollCallTest",
  ),
  _fault(
    "F10",
    "fails at the same step after every start, also by a fatal signal",
    "after three starts one checkpoint back, after three more no further",
    "faults.LoopTest.test_goes_back_a_checkpoint_then_stops",
    "starts.CleanTest",
    "history.CrashesTest",
  ),
  _fault(
    "F11",
    "two runs in one workdir; the first is killed",
    "the second is refused with the name of the first; the lock is free",
    "faults.SignalTest.test_a_workdir_is_for_one_at_a_time",
    "experiments.WorkdirTest.test_is_for_one_run_at_a_time",
  ),
  _fault(
    "F12",
    "disk full in the middle of a save, by limit and on a tmpfs",
    "said at the next step, nothing half written left, last good one kept;"
    " stops, or goes on and says at the end that it is not saved",
    "faults.StorageTest.test_a_full_disk_is_said_at_the_next_step",
    "faults.StorageTest.test_or_the_run_goes_on",
    "faults.StorageTest.test_a_full_file_system",
  ),
  _fault(
    "F13",
    "workdir read-only, below a file",
    "refused before compiling; 2",
    "faults.StorageTest.test_a_file_system_that_cannot_be_written",
    "experiments.WorkdirTest.test_refuses_a_folder_that_cannot_be",
  ),
  _fault(
    "F14",
    "each file of the newest checkpoint halved, zeroed, emptied, deleted",
    "set aside, the one before is taken, loud",
    "checkpoint.DamageTest.test_every_file_damaged_in_every_way",
    "faults.StorageTest.test_a_damaged_checkpoint_is_set_aside",
  ),
  _fault(
    "F15",
    "one bit flipped anywhere, 200 times",
    "found and named, or of nothing that is read",
    "checkpoint.DamageTest.test_one_bit_anywhere",
    "checkpoint.DamageTest.test_names_the_array",
    "digest.DigestTest",
  ),
  _fault(
    "F16",
    "a folder half copied, renamed, of another version",
    "is no checkpoint",
    "checkpoint.RefuseTest.test_what_was_never_finished",
    "checkpoint.RefuseTest.test_a_folder_of_another_name",
    "checkpoint.RefuseTest.test_a_manifest_of_another_version",
  ),
  _fault(
    "F17",
    "all checkpoints damaged, or gone",
    "4 with the list; never from the start in silence",
    "checkpoint.DamageTest.test_with_all_damaged_there_is_none",
    "experiments.StartTest.test_lost_checkpoints_are_never_replaced",
  ),
  _fault(
    "F18",
    "a checkpoint of another architecture",
    "refused, array by array and setting by setting",
    "checkpoint.RefuseTest.test_another_architecture",
    "experiments.WorkdirTest.test_another_configuration_is_told",
    "text.BadRunTest.test_another_configuration_than_the_checkpoint",
  ),
  _fault(
    "F19",
    "a checkpoint of other types",
    "refused, never cast",
    "checkpoint.RefuseTest.test_another_architecture",
  ),
  _fault(
    "F20",
    "failed saves in a row with one checkpoint kept",
    "that one stays",
    "checkpoint.FailedSaveTest",
  ),
  _fault(
    "F21",
    "the thread that writes fails",
    "raised at the next step at the latest",
    "checkpoint.FailedSaveTest",
    "faults.StorageTest.test_a_full_disk_is_said_at_the_next_step",
  ),
  _fault(
    "F22",
    "a checkpoint with other files, links, names, a made-up manifest",
    "refused; nothing outside is read, nothing is run",
    "checkpoint.RefuseTest.test_links_and_files_of_others",
    "checkpoint.RefuseTest.test_a_manifest_that_somebody_else_made",
    "checkpoint.RefuseTest.test_a_manifest_without_end",
    "checkpoint.RefuseTest.test_other_names_are_no_steps",
    "safety.SafetyTest",
  ),
  _fault(
    "F23",
    "N steps, a restart and N more",
    "all of the state, the data and the metrics as in 2N",
    "train.ResumeTest",
    "experiments.EndToEndTest",
  ),
  _fault(
    "F24",
    "goes on with other devices, layouts, processes",
    "same state and batch, loss within 1e-6",
    "runner.RelayoutTest.test_a_save_goes_on_in_another_layout",
    "processes.TwoProcessesTest",
  ),
  _fault(
    "F25",
    "other batch sizes, splits and numbers of processes on the way",
    "every row once, in order",
    "runner.RelayoutTest.test_rows_do_not_depend",
    "processes.RowsTest",
  ),
  _fault(
    "F26",
    "other intervals of checkpoints and evaluations",
    "the same bits",
    "faults.IntervalsTest",
  ),
  _fault(
    "F27",
    "other micro-batches, recomputation",
    "same counts and bias bit for bit, same gradient",
    "train.SplitTest",
    "recompute",
  ),
  _fault(
    "F28",
    "a logged step is done again",
    "the same bits, or named what differs",
    "runner.NumbersTest.test_a_step_done_again_is_the_same",
    "runner.NumbersTest.test_what_differs_is_named",
    "runner.NumbersTest.test_a_step_that_cannot_be_done_again",
  ),
  _fault(
    "F29",
    "NaN or infinity in loss or gradient",
    "the step changes nothing but its counters; told with its rows",
    "train.StepTest.test_a_step_that_is_not_finite",
    "reporter.ReporterTest.test_a_bad_step_is_told",
    "ema",
  ),
  _fault(
    "F30",
    "too many bad steps in a row",
    "3; no checkpoint of a bad state",
    "runner.NumbersTest.test_too_many_bad_steps_end_the_run",
    "reporter.ReporterTest.test_too_many_in_a_row_end_the_run",
  ),
  _fault(
    "F31",
    "loss or gradient norm jumps",
    "told; if asked for, back to a checkpoint and its data left out",
    "reporter.ReporterTest",
    "runner.NumbersTest.test_a_jump_is_gone_back_before",
    "runner.NumbersTest.test_jumps_without_end_end_the_run",
  ),
  _fault(
    "F32",
    "zeros, 1e6, denormals, infinity and NaN into FP8",
    "saturates, counted; what is not finite stays so",
    "tiles.QuantizeTest",
  ),
  _fault(
    "F33",
    "router scores that underflow, tie, or lose to a negative bias",
    "finite, lowest index, never a masked expert",
    "router.RouteTest",
    "router.SelectTest",
  ),
  _fault(
    "F34",
    "all tokens to one expert; experts and devices with none",
    "no NaN, no hang, gradients of zero",
    "experts.GroupedFfnTest",
    "dispatch.DispatchTest",
  ),
  _fault(
    "F35",
    "a batch without a label",
    "a loss of zero",
    "losses.CrossEntropyTest.test_all_labels_ignored_is_zero",
  ),
  _fault(
    "F36",
    "ids outside of the vocabulary, or no integers",
    "2 with file and offset",
    "packing.CheckIdsTest",
    "packing.PackTest.test_id_above_the_vocabulary_leaves_no_file",
  ),
  _fault(
    "F37",
    "lengths of 0, 1, up to the MTP depth; batches that do not divide",
    "refused",
    "config.FieldTest.test_refuses",
    "experiments.CommandLineTest.test_refuses",
  ),
  _fault(
    "F38",
    "bad UTF-8, NUL, BOM, CRLF, empty files, lines of 100 MB",
    "by policy: refused with the offset, replaced, skipped",
    "corpus.ReadTest",
  ),
  _fault(
    "F39",
    "text or tokens missing, cut, changed since the run began",
    "named at the start",
    "packing.PackTest",
    "stream.PrepareTest",
  ),
  _fault(
    "F40",
    "folders listed in another order",
    "the same rows",
    "corpus.ReadTest.test_listing_order_does_not_matter",
  ),
  _fault(
    "F41",
    "wrong flags and settings, 4,500 of them at random",
    "2 before JAX starts, all problems at once, with suggestions",
    "experiments.CommandLineTest",
    "config.FieldTest",
    "config.OverrideTest",
    "fuzz.SettingsTest",
  ),
  _fault(
    "F42",
    "tokenizer and model of other vocabularies; no special tokens",
    "2",
    "tokenizer.TrainTest.test_model_smaller_than_the_vocabulary",
    "tokenizer.LoadTest",
  ),
  _fault(
    "F43",
    "malformed safetensors; types relabelled; random bytes",
    "refused",
    "safetensors.BadFileTest",
    "hf.RefusedTest.test_relabelled_dtype",
    "hf.MutatedTest",
    "fuzz.FilesTest",
  ),
  _fault(
    "F44",
    "an index that points elsewhere; links; shards missing, extra, twice",
    "refused",
    "hf.RefusedTest",
  ),
  _fault(
    "F45",
    "tensors missing, extra, misshapen; FP8 scales absent, NaN, negative",
    "all listed; never drawn at random",
    "hf.RefusedTest.test_missing_extra_and_misshaped_tensors",
    "hf.RefusedTest.test_scales",
  ),
  _fault(
    "F46",
    "only pickles; a config with remote code",
    "refused; never imported",
    "hf.RefusedTest.test_only_pickles",
    "hf.RefusedTest.test_remote_code",
    "safety.SafetyTest",
  ),
  _fault(
    "F47",
    "an export stopped half-way",
    "no index until all shards are verified; goes on",
    "convert.InterruptedTest",
  ),
  Fault("F48", "code rewards", "-", "there are none yet"),
)
