//! The hostile table: every row, a thing that a hostile or broken driver may do, against every device.
//!
//! After each row the device must either go on or be in DEVICE_NEEDS_RESET with an interrupt, as the row
//! says, and after a reset it must serve a good request again. See `docs/security.md`.

mod chains;
#[path = "../common/mod.rs"]
mod common;
mod heap;
mod limits;
mod random;
mod registers;
mod rings;
mod snapshots;
mod steps;
mod subject;

use common::{INTERRUPT_STATUS, Machine, RUNNING, STATUS};
use subject::Subject;

/// How a row must leave the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Running.
    Alive,
    /// In DEVICE_NEEDS_RESET, the driver told.
    NeedsReset,
    /// One or the other, by what the device makes of the bytes.
    Either,
    /// Wherever the driver left it, but not failed.
    Stopped,
}

type Row = fn(&dyn Subject, &mut Machine) -> Outcome;

/// Runs one row on a device that the driver has just started.
fn play(subject: &dyn Subject, row: Row) {
    let mut machine = Machine::new(subject.device());
    machine.start();
    assert_eq!(machine.get(STATUS), RUNNING, "the device starts");
    judge(row(subject, &mut machine), &mut machine);
    // Whatever happened: a reset and a proper start make it a good device again.
    machine.set(STATUS, 0);
    assert_eq!(machine.get(STATUS), 0, "the reset is complete");
    assert_eq!(machine.get(INTERRUPT_STATUS), 0, "the reset clears the interrupt status");
    machine.place_rings();
    machine.start();
    assert_eq!(machine.get(STATUS), RUNNING, "the device starts again");
    subject.good(&mut machine);
}

fn judge(outcome: Outcome, machine: &mut Machine) {
    let status = machine.get(STATUS);
    let failed = machine.needs_reset();
    match outcome {
        Outcome::Alive => assert_eq!(status, RUNNING, "the device goes on"),
        Outcome::NeedsReset => assert!(failed, "the device needs a reset"),
        Outcome::Either => assert_eq!(status & RUNNING, RUNNING, "the status is the driver's"),
        Outcome::Stopped => assert!(!failed, "nothing failed"),
    }
    if failed {
        assert_eq!(machine.get(INTERRUPT_STATUS) & 2, 2, "a failed device announces a change of its configuration");
        assert!(machine.interrupted(), "a failed device interrupts");
    }
}

/// One test per row and device.
macro_rules! table {
    ($devices:tt $($part:ident: $rows:tt)*) => {
        $(table!(@part $devices $part $rows);)*
    };
    (@part [$($device:ident),*] $part:ident $rows:tt) => {
        mod $part {
            $(table!(@device $device $part $rows);)*
        }
    };
    (@device $device:ident $part:ident [$($row:ident),* $(,)?]) => {
        mod $device {
            $(
                #[test]
                fn $row() {
                    crate::play(&crate::subject::$device(), crate::$part::$row);
                }
            )*
        }
    };
}

mod hostile {
    table! {
        [rng, block, block_blocking, block_read_only, fs, vsock, net_transmit, net_receive, net_control,
         balloon_inflate, balloon_report, mem]
        chains: [
            descriptor_loop, descriptor_loop_to_itself, next_at_table_size, next_far_outside,
            head_at_table_size, head_far_outside, loop_in_indirect_table, next_outside_indirect_table,
            indirect_nested, indirect_with_next, indirect_length_zero, indirect_length_odd,
            indirect_table_of_65536, indirect_table_of_4_gib, indirect_table_outside_memory,
            indirect_table_beyond_end, indirect_table_wraps, chain_longer_than_any_request,
            buffer_of_4_gib, chain_beyond_4_gib, address_wraps, buffer_straddles_gap, buffer_in_gap,
            buffer_beyond_memory, only_first_byte_valid, only_last_byte_valid, buffer_over_adjacent_regions,
            readable_after_writable, zero_length_buffers, zero_length_buffer_outside_memory,
            no_writable_buffer, no_readable_buffer, header_cut_short, header_bytewise, one_byte_each,
            every_bit_of_the_flags,
        ]
        rings: [
            available_index_beyond_size, available_index_backwards, available_index_exactly_size,
            same_head_twice, index_wraps, ring_outside_memory, ring_in_gap, ring_one_byte_beyond_memory,
            ring_wraps, ring_to_the_last_byte, rings_over_each_other, used_ring_over_descriptors,
            size_zero, size_no_power_of_two, size_too_large, size_wraps_to_valid, areas_misaligned,
            no_queue_ready, frozen_after_driver_ok, frozen_before_features_ok, frozen_while_ready,
            queue_out_of_range, notify_out_of_range, notify_before_driver_ok, notify_storm,
            buffers_into_the_rings, used_event_ahead,
        ]
        steps: [
            every_step_from_every_status, driver_ok_without_features_ok, features_ok_twice, unoffered_features,
            version_1_missing, features_after_features_ok, failed_stops_everything, reset_with_request_pending,
            reset_between_turns, kick_after_failure, start_a_hundred_times, high_status_bits,
        ]
        registers: [
            config_read_out_of_bounds, config_write_out_of_bounds, config_written_everywhere, odd_reads, odd_writes,
            unmapped_reads_are_ones, read_only_registers, any_value_anywhere, interrupt_status,
            no_interrupt_where_unwanted, shared_memory_that_is_not_there,
        ]
        limits: [huge_writable_request, huge_readable_request, queue_full_of_requests, requests_forever]
        snapshots: [
            good_snapshot, snapshot_lies, snapshot_with_indices_astray, stale_event_index_after_restore,
            snapshot_of_failed_device, snapshot_in_the_middle_of_set_up,
        ]
        random: [
            random_registers_1, random_registers_2, random_registers_3, random_registers_4,
            random_rings_1, random_rings_2, random_rings_3, random_rings_4,
        ]
    }
}
