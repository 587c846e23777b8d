//! Virtqueues by themselves, where a device in between would hide something.

mod common;

use common::{Desc, INDIRECT, NEXT, SEAM, linked, memory, readable, writable};
use katavm_devices::memory::GuestMemory;
use katavm_devices::virtio::queue::{ChainError, QueueError, QueueSet, VirtQueue};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

const SIZE: u16 = 16;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;

struct Driver {
    memory: GuestMemory,
    next: u16,
}

impl Driver {
    fn new() -> (Self, VirtQueue) {
        let memory = memory();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(DESC as u32), None);
        queue.set_avail_ring_address(Some(AVAIL as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        let queue = VirtQueue::new(queue, memory.clone()).unwrap();
        (Self { memory, next: 0 }, queue)
    }

    fn describe(&self, index: u16, desc: Desc) {
        let at = DESC + 16 * u64::from(index);
        self.memory.write_obj(desc.addr, GuestAddress(at)).unwrap();
        self.memory.write_obj(desc.len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(desc.flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(desc.next, GuestAddress(at + 14)).unwrap();
    }

    fn offer(&mut self, head: u16) {
        let entry = AVAIL + 4 + 2 * u64::from(self.next % SIZE);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.next += 1;
        self.memory.write_obj(self.next, GuestAddress(AVAIL + 2)).unwrap();
    }
}

#[test]
fn a_head_that_the_device_still_has_is_refused() {
    let (mut driver, mut queue) = Driver::new();
    driver.describe(3, writable(0x10000, 8));
    driver.offer(3);
    driver.offer(3);
    let chain = queue.pop().unwrap().unwrap();
    assert!(matches!(queue.pop(), Err(QueueError::DuplicateHead(3))));
    queue.add_used(chain.head(), 8).unwrap();
    assert!(queue.pop().unwrap().is_some(), "given back, it may come again");
}

#[test]
fn a_chain_is_given_back_once() {
    let (mut driver, mut queue) = Driver::new();
    driver.describe(0, writable(0x10000, 8));
    driver.offer(0);
    assert!(queue.add_used(0, 0).is_err(), "not before it was taken");
    queue.pop().unwrap().unwrap();
    queue.add_used(0, 8).unwrap();
    assert!(queue.add_used(0, 8).is_err());
    assert!(queue.add_used(SIZE, 8).is_err());
    assert_eq!(driver.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 1);
}

#[test]
fn a_chain_that_was_put_back_comes_again() {
    let (mut driver, mut queue) = Driver::new();
    for head in 0..2 {
        driver.describe(head, writable(0x10000, 8));
        driver.offer(head);
    }
    assert_eq!(queue.pop().unwrap().unwrap().head(), 0);
    assert_eq!(queue.pop().unwrap().unwrap().head(), 1);
    queue.undo_pop();
    assert_eq!(queue.save().in_flight, [0]);
    assert_eq!(queue.pop().unwrap().unwrap().head(), 1);
    assert!(queue.pop().unwrap().is_none());
}

#[test]
fn an_index_that_goes_back_is_noticed_when_it_is_read_again() {
    let (mut driver, mut queue) = Driver::new();
    for head in 0..3 {
        driver.describe(head, writable(0x10000, 8));
        driver.offer(head);
    }
    queue.pop().unwrap().unwrap();
    driver.memory.write_obj(1_u16, GuestAddress(AVAIL + 2)).unwrap();
    let heads: Vec<_> = (0..2).map(|_| queue.pop().unwrap().unwrap().head()).collect();
    assert_eq!(heads, [1, 2], "they were made available, and that cannot be taken back");
    assert!(matches!(queue.pop(), Err(QueueError::AvailableIndex { from: 3, to: 1 })));
}

#[test]
fn what_comes_after_chains_were_put_back_is_taken_after_them() {
    let (mut driver, mut queue) = Driver::new();
    for head in 0..5 {
        driver.describe(head, writable(0x10000, 8));
    }
    (0..3).for_each(|head| driver.offer(head));
    for _ in 0..2 {
        queue.pop().unwrap().unwrap();
    }
    queue.put_back();
    (3..5).for_each(|head| driver.offer(head));
    let heads: Vec<_> = std::iter::from_fn(|| queue.pop().unwrap()).map(|chain| chain.head()).collect();
    assert_eq!(heads, [0, 1, 2, 3, 4]);
}

#[test]
fn all_that_is_in_flight_can_be_put_back() {
    let (mut driver, mut queue) = Driver::new();
    for head in [4, 2, 9] {
        driver.describe(head, writable(0x10000, 8));
        driver.offer(head);
        queue.pop().unwrap().unwrap();
    }
    queue.add_used(4, 0).unwrap();
    queue.put_back();
    assert!(queue.save().in_flight.is_empty());
    let heads = [queue.pop(), queue.pop()].map(|chain| chain.unwrap().unwrap().head());
    assert_eq!((heads, queue.pop().unwrap().is_none()), ([2, 9], true));
}

#[test]
fn chains_that_belong_together_appear_together() {
    let (mut driver, mut queue) = Driver::new();
    // Over the end of the ring as well.
    let mut index = 0u16;
    for _ in 0..10 {
        for head in [4, 2, 9] {
            driver.describe(head, writable(0x10000, 8));
            driver.offer(head);
            queue.pop().unwrap().unwrap();
        }
        let seen = driver.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap();
        assert_eq!(seen, index);
        queue.add_used_together(&[(4, 100), (2, 200), (9, 7)]).unwrap();
        for (head, len) in [(4u32, 100u32), (2, 200), (9, 7)] {
            let entry = USED + 4 + 8 * u64::from(index % SIZE);
            assert_eq!(driver.memory.read_obj::<[u32; 2]>(GuestAddress(entry)).unwrap(), [head, len]);
            index += 1;
        }
        assert_eq!(driver.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), index);
    }
    assert!(queue.add_used_together(&[(4, 1)]).is_err(), "it was given back already");
}

#[test]
fn an_interrupt_is_due_when_the_awaited_entry_is_among_those_given() {
    let (mut driver, queue) = Driver::new();
    let mut state = queue.save();
    state.event_idx = true;
    let mut queue = VirtQueue::restore(&state, driver.memory.clone()).unwrap();
    let mut give = |count: u16, event: u16| {
        let used_event = AVAIL + 4 + 2 * u64::from(SIZE);
        driver.memory.write_obj(event, GuestAddress(used_event)).unwrap();
        let chains: Vec<(u16, u32)> = (0..count)
            .map(|head| {
                driver.describe(head, writable(0x10000, 8));
                driver.offer(head);
                (queue.pop().unwrap().unwrap().head(), 8)
            })
            .collect();
        if !chains.is_empty() {
            queue.add_used_together(&chains).unwrap();
        }
        queue.needs_notification().unwrap()
    };
    // Entries 0 to 4, then 5 to 7, and so on.
    assert!(give(5, 0));
    assert!(give(3, 7));
    assert!(!give(2, 10));
    assert!(give(2, 10), "10 is the first of two");
    assert!(!give(3, 11), "11 was there before");
    assert!(!give(0, 14), "nothing was given");
    assert!(!give(1, 20));
}

#[test]
fn what_is_in_flight_survives_a_snapshot() {
    let (mut driver, mut queue) = Driver::new();
    for head in [4, 2, 9] {
        driver.describe(head, writable(0x10000, 8));
        driver.offer(head);
        queue.pop().unwrap().unwrap();
    }
    queue.add_used(2, 8).unwrap();
    let state = queue.save();
    assert_eq!(state.in_flight, [4, 9]);
    let mut restored = VirtQueue::restore(&state, driver.memory.clone()).unwrap();
    driver.offer(9);
    assert!(matches!(restored.pop(), Err(QueueError::DuplicateHead(9))));
    restored.add_used(9, 8).unwrap();
    assert!(restored.add_used(2, 8).is_err(), "that one was given back before");
}

#[test]
fn buffers_join_regions_that_touch() {
    let (mut driver, mut queue) = Driver::new();
    driver.describe(0, Desc { flags: NEXT, next: 1, ..readable(SEAM - 3, 8) });
    driver.describe(1, writable(SEAM - 1, 2));
    driver.offer(0);
    driver.memory.write_slice(b"abcdefgh", GuestAddress(SEAM - 3)).unwrap();
    let chain = queue.pop().unwrap().unwrap();
    let mut bytes = [0; 8];
    let mut reader = chain.reader(queue.memory());
    assert_eq!(reader.iovecs(8).iter().map(|vector| vector.iov_len).collect::<Vec<_>>(), [3, 5]);
    reader.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"abcdefgh");
    chain.writer(queue.memory()).write_all(b"xy").unwrap();
    driver.memory.read_slice(&mut bytes, GuestAddress(SEAM - 3)).unwrap();
    assert_eq!(&bytes, b"abxyefgh");
}

#[test]
fn a_run_of_buffers_can_be_cut_anywhere() {
    let (mut driver, mut queue) = Driver::new();
    for (index, desc) in linked(&[readable(0x10000, 3), readable(0x20000, 0), readable(0x30000, 4)]).iter().enumerate()
    {
        driver.describe(index as u16, *desc);
    }
    driver.memory.write_slice(b"abc", GuestAddress(0x10000)).unwrap();
    driver.memory.write_slice(b"defg", GuestAddress(0x30000)).unwrap();
    driver.offer(0);
    let chain = queue.pop().unwrap().unwrap();
    for cut in 0..=9 {
        let mut first = chain.reader(queue.memory());
        let mut rest = first.split_off(cut);
        let mut bytes = [b'.'; 8];
        let len = first.read(&mut bytes);
        assert_eq!(len, cut.min(7));
        assert_eq!(rest.read(&mut bytes[len..]), 7 - len);
        assert_eq!((&bytes[..7], first.consumed(), rest.consumed()), (&b"abcdefg"[..], len, 7 - len));
        assert!(first.read_obj::<u8>().is_err() && rest.write_obj(&0u8).is_err());
    }
}

#[test]
fn a_bad_chain_is_named_in_the_error() {
    let (mut driver, mut queue) = Driver::new();
    driver.describe(0, Desc { flags: INDIRECT, ..readable(0x10000, 24) });
    driver.offer(0);
    let error = queue.pop().unwrap_err();
    assert!(matches!(error, QueueError::Chain { head: 0, error: ChainError::Indirect }), "{error}");
}

#[test]
fn queues_that_nobody_set_up_do_nothing() {
    let mut queues = QueueSet::new(&[16, 16]).unwrap();
    assert!(!queues.is_active() && queues.memory().is_none());
    assert!(queues.pop(0).is_none() && !queues.enable_kicks(0));
    queues.add_used(0, 0, 0);
    queues.notify(7);
    queues.serve(0, 8, |_, _| panic!("nothing to serve"));
    queues.kick(7);
    assert!(!queues.take_kick(0) && !queues.take_kick(7));
    queues.kick(1);
    assert!(queues.take_kick(1) && !queues.take_kick(1));
}
