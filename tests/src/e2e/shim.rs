//! The shim where things do not go as planned: readers that do not read, clients and containers that go first.

use std::path::Path;

use anyhow::Result;

use super::containerd::containerd;
use super::leftovers::Traces;
use super::shell::expect;
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = (
    "shim",
    &[
        ("the_end_is_told_even_if_nobody_reads_the_output", unread),
        ("last_words_wait_for_a_containerd_that_is_away", last_words),
        ("the_first_container_of_a_pod_may_go_first", first_goes),
        ("a_container_of_the_same_name_may_follow_at_once", same_name),
        ("delete_ends_a_container_of_a_living_server_in_time", delete),
        ("a_client_may_go_away_at_any_moment", impatient),
        ("output_is_whole_though_containerd_is_killed", output::<32>),
        ("a_program_of_the_host_takes_the_output", logger),
        ("what_a_logger_leaves_running_is_reaped", orphan),
    ],
);

/// Those that take long.
pub const LONG: Table = (
    "shim",
    &[
        ("a_gibibyte_is_whole_though_containerd_is_killed", output::<1024>),
        ("twenty_pods_at_once_leave_nothing", twenty),
        ("two_hundred_containers_of_a_pod_leave_nothing_in_its_server", cycles),
        ("kills_at_a_hundred_random_moments_leave_nothing", kills),
    ],
);

/// A script with containerd, after which nothing of katavm is left.
fn clean(context: &Context, text: &str, lines: &[&str]) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let output = containerd::<1>(context, text)?;
    expect(&output, lines)?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}

fn unread(context: &Context) -> Result<Verdict> {
    let text = "ctr run --runtime io.containerd.katavm.v2 $image c1 yes >/dev/null 2>&1 & client=$!
         until [ \"$(status c1)\" = RUNNING ]; do sleep 0.2; done; kill -STOP $client; sleep 2
         SECONDS=0; ctr task kill -s KILL c1; until [ $(status c1) = STOPPED ]; do sleep 0.2; done
         [ $SECONDS -lt 60 ] && echo told
         ctr task rm c1 2>&1 | grep -o 'exit code 137'; kill -KILL $client; wait $client || true
         ctr container rm c1; gone";
    clean(context, text, &["told", "exit code 137"])
}

fn last_words(context: &Context) -> Result<Verdict> {
    let text = "run -d --fifo-dir $PWD/fifos $image c1 sh -c 'until [ -e /end ]; do sleep 0.1; done; seq 5000; exit 6' </dev/null &
         until [ \"$(status c1)\" = RUNNING ]; do sleep 0.2; done
         kill -KILL $server; wait $server || true; pkill -KILL -x ctr || true
         katavm --root /run/katavm-containerd/default exec c1 touch /end
         until [ $(katavm --root /run/katavm-containerd/default state c1 | grep -c stopped) = 1 ]; do sleep 0.2; done
         sleep 1; timeout 20 cat $(find fifos -name '*stdout') | cmp - <(seq 5000) && echo whole
         server; until [ \"$(status c1)\" = STOPPED ]; do sleep 0.2; done
         ctr task rm c1 2>&1 | grep -o 'exit code 6'; ctr container rm c1; gone";
    clean(context, text, &["whole", "exit code 6"])
}

/// A logger of `binary://`, and one that is none.
fn logger(context: &Context) -> Result<Verdict> {
    let text = "cat >logger <<'END'
#!/bin/sh
PATH=/usr/bin:/bin
exec 5>&-
{ echo $CONTAINER_NAMESPACE $CONTAINER_ID; cat <&3; cat <&4; } >$2
END
         chmod 755 logger
         run -d --log-uri \"binary://$PWD/logger?to=$PWD/log\" $image c1 sh -c 'echo err >&2; seq 200000; exit 8' </dev/null
         until [ $(status c1) = STOPPED ]; do sleep 0.2; done; ctr task rm c1 2>&1 | grep -o 'exit code 8'; ctr container rm c1
         cmp log <(echo default c1; seq 200000; echo err) && echo whole; pgrep -f $PWD/logger || echo ended
         run -d --log-uri binary://$PWD/nosuch $image c2 true </dev/null 2>&1 | grep -o 'nosuch: No such file or directory'
         ctr container rm c2 >p 2>&1 || true; gone";
    clean(context, text, &["exit code 8", "whole", "ended", "nosuch: No such file or directory"])
}

/// The server is a sub-reaper: else the lab's init would have it.
fn orphan(context: &Context) -> Result<Verdict> {
    let text = "cat >logger <<'END'
#!/bin/sh
PATH=/usr/bin:/bin
(sleep 1000 3<&- 4<&- 5<&- & echo $! >$2)
exec 5>&-
cat <&3
END
         chmod 755 logger
         run -d --log-uri \"binary://$PWD/logger?to=$PWD/left\" $image c1 sleep 1000 </dev/null
         left=$(cat left); cat /proc/$(ps -o ppid= $left | tr -d ' ')/comm
         kill $left; while [ -e /proc/$left ]; do sleep 0.2; done; echo reaped
         ctr task kill -s KILL c1; until [ $(status c1) = STOPPED ]; do sleep 0.2; done
         ctr task rm c1 2>&1 | grep -o 'exit code 137'; ctr container rm c1; gone";
    clean(context, text, &["katavm-sandbox", "reaped", "exit code 137"])
}

fn first_goes(context: &Context) -> Result<Verdict> {
    let text = "pod='--annotation io.containerd.runc.v2.group=g'
         for id in c1 c2; do run -d $pod $image $id sleep 1000 </dev/null; done
         group() { sed 's/^0:://' /proc/$(pgrep -x katavm-sandbox)/cgroup; }
         group; ctr task rm -f c1 >p 2>&1; ctr container rm c1; group
         for id in c1 c3; do run -d $pod $image $id sleep 1000 </dev/null; done; pgrep -xc katavm-sandbox
         for id in c1 c2 c3; do ctr task exec --exec-id e $id echo in $id </dev/null; done
         katavm --root /run/katavm-containerd/default list -q
         for id in c2 c3 c1; do ctr task rm -f $id >p 2>&1; ctr container rm $id; done; gone
         until ! ls -d /sys/fs/cgroup/default/c? 2>p; do sleep 0.1; done";
    clean(context, text, &["/default/c1", "/default/c1", "1", "in c1", "in c2", "in c3", "c1", "c2", "c3"])
}

fn same_name(context: &Context) -> Result<Verdict> {
    let text = "for n in 1 2 3 4 5; do run --rm $image c1 echo $n </dev/null; done; gone";
    clean(context, text, &["1", "2", "3", "4", "5"])
}

fn delete(context: &Context) -> Result<Verdict> {
    let text = "pod='--annotation io.containerd.runc.v2.group=g'
         shim() { (cd /run/containerd/io.containerd.runtime.v2.task/default/$1
             containerd-shim-katavm-v2 -namespace default -address /run/containerd/containerd.sock -id $1 -bundle $PWD delete | wc -c | sed 's/^[1-9].*/an answer/'); }
         for id in c1 c2; do run -d $pod $image $id sleep 1000 </dev/null; done
         SECONDS=0; shim c1; [ $SECONDS -le 5 ] && echo in time
         ctr task exec --exec-id e c2 echo the other lives </dev/null
         pkill -STOP -x katavm-sandbox; SECONDS=0; shim c2; [ $SECONDS -le 6 ] && echo in time
         for id in c1 c2; do ctr task rm -f $id >p 2>&1 || true; ctr container rm $id; done; gone";
    clean(context, text, &["an answer", "in time", "the other lives", "an answer", "in time"])
}

fn impatient(context: &Context) -> Result<Verdict> {
    let text = "for delay in 0.1 0.5 1 1.5 2 3; do
             timeout -s KILL $delay ctr run --runtime io.containerd.katavm.v2 $image c1 sleep 1000 </dev/null >p 2>&1 || true
             until ctr task rm -f c1 >p 2>&1 || [ -z \"$(status c1)\" ]; do sleep 0.2; done
             until ctr container rm c1 >p 2>&1 || [ -z \"$(ctr container ls -q)\" ]; do ctr task rm -f c1 >p 2>&1 || true; sleep 0.2; done
             # A client that goes before there is a container leaves its snapshot.
             ctr snapshot rm c1 >p 2>&1 || true; gone; echo clean after $delay
         done";
    let after = ["0.1", "0.5", "1", "1.5", "2", "3"].map(|delay| format!("clean after {delay}"));
    clean(context, text, &after.each_ref().map(String::as_str))
}

/// `MIB` mebibytes through a named pipe whose reader stays, while containerd is killed and starts again three times.
fn output<const MIB: u32>(context: &Context) -> Result<Verdict> {
    let bytes = u64::from(MIB) << 20;
    let text = format!(
        "data() {{ echo 'yes 0123456789abcde | head -c {bytes}'; }}
         run -d --fifo-dir $PWD/fifos $image c1 sh -c \"until [ -e /go ]; do sleep 0.1; done; $(data); exit 6\" </dev/null &
         until [ \"$(status c1)\" = RUNNING ]; do sleep 0.2; done; pkill -KILL -x ctr || true
         sha256sum <$(find fifos -name '*stdout') >sum & reader=$!
         katavm --root /run/katavm-containerd/default exec c1 touch /go
         for n in 1 2 3; do kill -KILL $server; wait $server || true; server; sleep 1; done
         wait $reader; [ \"$(cat sum)\" = \"$(eval \"$(data)\" | sha256sum)\" ] && echo whole
         until [ \"$(status c1)\" = STOPPED ]; do sleep 0.2; done
         ctr task rm c1 2>&1 | grep -o 'exit code 6'; ctr container rm c1; gone"
    );
    clean(context, &text, &["whole", "exit code 6"])
}

/// What a server has in memory without the guest's RAM, in KiB, and its descriptors and mounts.
const MEASURE: &str =
    "memory() { awk '/^Size:/ { ram = $2 >= 262144 } /^Pss:/ && !ram { sum += $2 } END { print sum }' /proc/$1/smaps; }
         held() { echo $(ls /proc/$1/fd | wc -l) descriptors, $(wc -l </proc/$1/mountinfo) mounts; }
         threads() { ls /proc/$1/task | wc -l; }";

fn twenty(context: &Context) -> Result<Verdict> {
    let text = format!(
        "{MEASURE}
         for n in $(seq 20); do run -d $image p$n sleep 10000 </dev/null & starts=\"${{starts:-}} $!\"; done
         for start in $starts; do wait $start; done; ctr task ls | grep -c RUNNING
         for n in $(seq 20); do ctr task exec --exec-id e p$n hostname </dev/null; done | wc -l
         for pid in $(pgrep -x katavm-sandbox); do memory $pid; done | sort -n | sed -n '10s/.*/memory of a server: & KiB/p' >&2
         ends=; for n in $(seq 20); do ctr task rm -f p$n >p 2>&1 & ends=\"$ends $!\"; done
         for end in $ends; do wait $end; done; ctr container rm $(ctr container ls -q) >p; gone"
    );
    clean(context, &text, &["20", "20"])
}

fn cycles(context: &Context) -> Result<Verdict> {
    let text = format!(
        "{MEASURE}
         pod='--annotation io.kubernetes.cri.sandbox-id=c1'; run -d $pod $image c1 sleep 10000 </dev/null; pid=$(pgrep -x katavm-sandbox)
         cycles() {{ for n in $(seq $1); do run --rm $pod $image c2 true </dev/null; done; }}
         cycles 20; sleep 1; held $pid >before; before=$(memory $pid); threads=$(threads $pid)
         cycles 200; sleep 1; held $pid >after; after=$(memory $pid); cat before after >&2; echo $before KiB, then $after KiB >&2
         cmp before after && echo nothing more; [ $((after - before)) -lt 1024 ] && echo no memory
         # Idle ones of the pool of threads end after ten seconds.
         until [ $(threads $pid) -le $threads ]; do sleep 1; done; echo no thread
         ctr task rm -f c1 >p 2>&1; ctr container rm c1; gone"
    );
    clean(context, &text, &["nothing more", "no memory", "no thread"])
}

/// Kills of the server, of containerd and of the guest's kernel. What containerd says of a container is right within ten
/// seconds, and it can be removed.
fn kills(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    // In pieces: each is a script with a limit of its own.
    for piece in 0..20 {
        let text = format!(
            "RANDOM={piece}
             settled() {{ n=0; until $@; do n=$((n + 1)); [ $n -lt 100 ] || {{ echo $* is not so; ctr task ls; exit 1; }}; sleep 0.1; done; }}
             ended() {{ case $(status c1) in ''|STOPPED) true;; *) false;; esac; }}
             removed() {{ ctr task rm -f c1 >p 2>&1; [ -z \"$(status c1)\" ] && ctr container rm c1 >p 2>&1 || [ -z \"$(ctr container ls -q)\" ]; }}
             # Before there is a shim, nothing is hit.
             hit() {{ until pkill -KILL -x 'katavm-sandbox|containerd-shim' || ! kill -0 $client 2>p; do sleep 0.02; done; }}
             for n in 1 2 3 4 5; do
                 what=$((RANDOM % 3)); moment=0.$((RANDOM % 10))
                 ctr run --runtime io.containerd.katavm.v2 --cap-add CAP_SYS_BOOT --privileged $image c1 sh -c 'while :; do date; sleep 0.1; done' </dev/null >out 2>&1 & client=$!
                 sleep $((RANDOM % 4))$(echo $moment | cut -c 2-)
                 case $what in
                     0) hit;;
                     1) kill -KILL $server; wait $server || true; server;;
                     2) [ \"$(status c1)\" = RUNNING ] && timeout 10 ctr task exec --exec-id e c1 sh -c 'echo c >/proc/sysrq-trigger' </dev/null >p 2>&1 || hit;;
                 esac
                 if [ $what = 1 ]; then kill -KILL $client || true; wait $client || true; else wait $client || true; settled ended; fi
                 settled removed; ctr snapshot rm c1 >p 2>&1 || true; gone
             done; echo all"
        );
        expect(&containerd::<1>(context, &text)?, &["all"])?;
        traces.expect_nothing_of_katavm()?;
    }
    Ok(Verdict::Passed)
}
