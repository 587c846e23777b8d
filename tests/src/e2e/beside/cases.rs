//! The cases: a name and a script.

/// A name and a script of bash.
pub type Case = (&'static str, &'static str);

pub const LIFECYCLE: &[Case] = &[
    ("run_gives_the_exit_code", "args 'exit 7'; rt run x; echo $?"),
    ("run_gives_128_and_the_signal", "args 'kill -9 $$'; rt run x; echo $?"),
    (
        "create_leaves_a_created_container",
        "rt create x </dev/null >out 2>&1; rt state x | jq -c '[.id, .status, .pid > 0, .bundle, .rootfs]' | sed \"s:$PWD::g\"",
    ),
    (
        "the_process_runs_from_start_on",
        "args 'echo ran >/f; sleep 1000'; rt create x </dev/null >out 2>&1; ls rootfs/f 2>/dev/null; rt start x; is running; \
         until [ -s rootfs/f ]; do sleep 0.05; done; cat rootfs/f",
    ),
    (
        "an_ended_container_is_stopped_until_deleted",
        "args 'exit 0'; background; is stopped; rt state x | jq .pid; rt delete x; rt state x >/dev/null 2>&1; echo $?",
    ),
    (
        "list_has_all",
        "args 'sleep 1000'; background; rt create y </dev/null >out 2>&1; rt list -q; \
         rt list -f json | jq -c '.[] | [.id, .status, .pid > 0, .owner]'; rt list | awk '{ print $1, $3 }'",
    ),
    (
        "kill_takes_names_and_numbers",
        "args 'trap \"echo usr1 >>/f\" USR1; trap \"echo term >>/f; exit\" TERM; while :; do sleep 0.1; done'; background; is running; sleep 1; \
         rt kill x USR1; sleep 1; rt kill x 10; sleep 1; rt kill x SIGTERM; is stopped; cat rootfs/f",
    ),
    (
        "pause_and_resume",
        "args 'sleep 1000'; background; rt pause x; is paused; rt resume x; is running; rt resume x >/dev/null 2>&1; echo $?",
    ),
    (
        "delete_refuses_what_runs_unless_forced",
        "args 'sleep 1000'; background; is running; rt delete x >/dev/null 2>&1; echo $?; rt delete -f x; echo $?; rt list -q; \
         rt delete -f x; echo $?",
    ),
    (
        "the_pid_file_has_the_states_pid",
        "args 'sleep 1000'; rt create --pid-file pid x </dev/null >out 2>&1; [ $(cat pid) = $(rt state x | jq .pid) ] && echo same; \
         kill -0 $(cat pid) && echo lives",
    ),
];

/// A container to execute in, once more for each.
pub const EXEC: &[Case] = &[
    (
        "exec_gives_output_and_code",
        "args 'sleep 1000'; background; rt exec x sh -c 'echo out; echo err >&2; exit 4' 2>err; echo $?; cat err",
    ),
    ("exec_reads_standard_input", "args 'sleep 1000'; background; seq 1000 | rt exec x sh -c 'cat | tail -n 1'"),
    ("exec_as_a_user", "args 'sleep 1000'; background; rt exec -u 1000:1001 -g 7 x id"),
    ("exec_in_a_folder", "args 'sleep 1000'; background; rt exec --cwd /data x pwd; rt exec x pwd"),
    ("exec_with_variables", "args 'sleep 1000'; background; rt exec -e A=b -e C= x env | sort"),
    (
        "exec_of_a_process_file",
        "args 'sleep 1000'; background; jq '.process | .args = [\"sh\", \"-c\", \"id -u; pwd; exit 9\"] | .user.uid = 5 | .cwd = \"/tmp\"' \
         config.json >process.json; rt exec -p process.json x; echo $?",
    ),
    (
        "exec_detached_goes_on",
        "args 'sleep 1000'; background; rt exec -d --pid-file pid x sh -c 'echo here >/f; sleep 1000' </dev/null >out 2>&1; echo $?; \
         until [ -s rootfs/f ]; do sleep 0.05; done; kill -0 $(cat pid) && echo lives",
    ),
    (
        "exec_of_what_is_not_there",
        "args 'sleep 1000'; background; rt exec x nosuch 2>&1 | grep -o 'executable file not found in $PATH'; rt exec x /etc/passwd 2>&1 | \
         grep -o 'permission denied'; rt exec x nosuch >/dev/null 2>&1; echo $?",
    ),
];

pub const TERMINAL: &[Case] = &[
    (
        "the_streams_are_one_terminal",
        "config '.process.terminal = true'; args 'test -t 0 && test -t 1 && test -t 2 && tty'; terminal 24 80 '' $RUNTIME --root $PWD/state run x",
    ),
    (
        "the_size_is_the_outer_ones",
        "config '.process.terminal = true'; args 'sleep 0.5; stty size'; terminal 31 101 '' $RUNTIME --root $PWD/state run x",
    ),
    (
        "control_c_interrupts",
        "config '.process.terminal = true'; args 'trap \"echo interrupted; exit 3\" INT; echo ready; while :; do sleep 0.1; done'; \
         terminal 24 80 '\\x03' $RUNTIME --root $PWD/state run x",
    ),
    (
        "lines_are_edited",
        "config '.process.terminal = true'; args 'stty -echo; echo ready; read line; echo \"<$line>\"'; terminal 24 80 'ab\\x7fc\\r' $RUNTIME --root $PWD/state run x",
    ),
    (
        "exec_has_one_as_well",
        "args 'sleep 1000'; background; terminal 33 99 '' $RUNTIME --root $PWD/state exec -t x sh -c 'test -t 0 && sleep 0.5 && stty size; exit 6'",
    ),
];

pub const MOUNTS: &[Case] = &[
    (
        "a_tmpfs_has_its_options",
        "config '.mounts += [{destination: \"/data\", type: \"tmpfs\", source: \"tmpfs\", options: [\"nosuid\", \"noexec\", \"nodev\", \"size=1m\", \"mode=1750\"]}]'; \
         args 'grep \" /data \" /proc/mounts | grep -o -e nosuid -e noexec -e nodev -e size=1024k; stat -c %a /data'; rt run x",
    ),
    (
        "a_bind_mount_is_the_hosts",
        "mkdir here; echo host >here/f; config --arg source $PWD/here '.mounts += [{destination: \"/data\", source: $source, options: [\"bind\"]}]'; \
         args 'cat /data/f; echo container >/data/g; chown 3:4 /data/g'; rt run x; cat here/g; stat -c %u:%g here/g",
    ),
    (
        "a_read_only_bind_mount",
        "mkdir here; config --arg source $PWD/here '.mounts += [{destination: \"/data\", source: $source, options: [\"rbind\", \"ro\"]}]'; \
         args 'echo x 2>&1 >/data/g | grep -o \"Read-only file system\"'; rt run x; ls here",
    ),
    (
        "a_single_file",
        "echo host >f; config --arg source $PWD/f '.mounts += [{destination: \"/etc/new\", source: $source, options: [\"bind\"]}]'; \
         args 'cat /etc/new; echo more >>/etc/new'; rt run x; cat f; stat -c %s rootfs/etc/new",
    ),
    (
        "mount_points_are_made",
        "config '.mounts += [{destination: \"/deep/er/still\", type: \"tmpfs\", source: \"tmpfs\"}]'; args 'mountpoint /deep/er/still'; rt run x; \
         stat -c '%n %a' rootfs/deep rootfs/deep/er/still",
    ),
    (
        "a_link_stays_inside_the_root",
        "ln -s /etc/elsewhere rootfs/link; mkdir rootfs/etc/elsewhere; config '.mounts += [{destination: \"/link\", type: \"tmpfs\", source: \"tmpfs\"}]'; \
         args 'grep -c \" /etc/elsewhere \" /proc/mounts'; rt run x; ls /etc/elsewhere 2>/dev/null; echo",
    ),
    (
        "masked_paths_are_empty",
        "config '.linux.maskedPaths += [\"/data\", \"/etc/passwd\"]'; echo x >rootfs/data/f; args 'ls /data; wc -c </etc/passwd; wc -c </proc/keys'; rt run x",
    ),
    (
        "read_only_paths",
        "config '.linux.readonlyPaths += [\"/data\"]'; args 'touch /data/f 2>&1 | grep -o \"Read-only file system\"; \
         echo 1 2>&1 >/proc/sys/kernel/panic | grep -o \"Read-only file system\"'; rt run x",
    ),
    (
        "a_read_only_root",
        "config '.root.readonly = true'; args 'touch /f 2>&1 | grep -o \"Read-only file system\"; touch /dev/shm/f && echo shm'; rt run x",
    ),
    (
        "the_usual_devices",
        "args 'for d in null zero full random urandom tty; do stat -c \"%n %F %t %T %a\" /dev/$d; done; readlink /dev/fd /dev/stdin /dev/stdout /dev/stderr /dev/ptmx'; rt run x",
    ),
];

pub const USERS: &[Case] = &[
    (
        "a_user_and_groups",
        "config '.process.user = {uid: 1000, gid: 1001, additionalGids: [5, 7]}'; args 'id; stat -c %u:%g /proc/self'; rt run x",
    ),
    ("a_umask", "config '.process.user.umask = 63'; args 'umask; touch /tmp/f; stat -c %a /tmp/f'; rt run x"),
    ("the_default_capabilities", "args 'grep -e Cap /proc/self/status'; rt run x"),
    (
        "all_five_sets",
        "config '.process.user.uid = 1000 | .process.capabilities = {bounding: [\"CAP_KILL\", \"CAP_CHOWN\"], permitted: [\"CAP_KILL\"], effective: [\"CAP_KILL\"], \
         inheritable: [\"CAP_KILL\"], ambient: [\"CAP_KILL\"]}'; args 'grep -e Cap /proc/self/status'; rt run x",
    ),
    (
        "no_capabilities",
        "config 'del(.process.capabilities)'; args 'grep -e Cap /proc/self/status; chown 1 /data 2>&1'; rt run x; echo $?",
    ),
    (
        "limits",
        "config '.process.rlimits = [{type: \"RLIMIT_NOFILE\", soft: 77, hard: 88}, {type: \"RLIMIT_CORE\", soft: 0, hard: 1024}]'; \
         args 'ulimit -Sn; ulimit -Hn; ulimit -Sc; ulimit -Hc'; rt run x",
    ),
    (
        "no_new_privileges",
        "args 'grep NoNewPrivs /proc/self/status'; rt run x; config '.process.noNewPrivileges = false'; rt run x",
    ),
    (
        "oom_score_and_names",
        "config '.process.oomScoreAdj = 321 | .hostname = \"hh\"'; args 'cat /proc/self/oom_score_adj; hostname; cat /proc/sys/kernel/hostname'; rt run x",
    ),
];

pub const CGROUPS: &[Case] = &[
    (
        "memory",
        "config '.linux.resources.memory = {limit: 67108864, reservation: 33554432}'; args 'cd /sys/fs/cgroup; cat memory.max memory.low'; rt run x",
    ),
    (
        "swap",
        "config '.linux.resources.memory = {limit: 67108864, swap: 100663296}'; args 'cat /sys/fs/cgroup/memory.max'; rt run x",
    ),
    (
        "pids",
        "config '.linux.resources.pids = {limit: 20}'; args 'cat /sys/fs/cgroup/pids.max; for i in $(seq 40); do sleep 3 & done 2>&1 | grep -o -m 1 \"t fork\"'; rt run x",
    ),
    (
        "cpu_quota",
        "config '.linux.resources.cpu = {quota: 25000, period: 50000}'; args 'cat /sys/fs/cgroup/cpu.max'; rt run x",
    ),
    // What shares are as a weight differs between versions of runc.
    (
        "cpu_weight",
        "config '.linux.resources.unified = {\"cpu.weight\": \"77\"}'; args 'cat /sys/fs/cgroup/cpu.weight'; rt run x",
    ),
    (
        "unified",
        "config '.linux.resources.unified = {\"memory.high\": \"50331648\", \"pids.max\": \"33\"}'; args 'cd /sys/fs/cgroup; cat memory.high pids.max'; rt run x",
    ),
    (
        "update",
        "args 'sleep 1000'; config '.linux.resources.memory = {limit: 67108864}'; background; rt update --memory 96M --pids-limit 44 --cpu-quota 30000 --cpu-period 60000 x; \
         rt exec x sh -c 'cd /sys/fs/cgroup; cat memory.max pids.max cpu.max'; echo '{\"pids\": {\"limit\": 55}}' | rt update -r - x; rt exec x cat /sys/fs/cgroup/pids.max",
    ),
    (
        "devices",
        "config '.process.capabilities.bounding += [\"CAP_MKNOD\"] | .process.capabilities.effective += [\"CAP_MKNOD\"] | .process.capabilities.permitted += [\"CAP_MKNOD\"] | \
         .linux.resources.devices = [{allow: false, access: \"rwm\"}, {allow: true, type: \"c\", major: 1, minor: 8, access: \"r\"}]'; \
         args 'head -c 1 /dev/random | wc -c; mknod /dev/n b 7 0 && head -c 1 /dev/n 2>&1 | grep -o \"Operation not permitted\"'; rt run x",
    ),
];

pub const HOOKS: &[Case] = &[
    (
        "the_order_of_all",
        "hook() { echo \"{path: \\\"/bin/sh\\\", args: [\\\"sh\\\", \\\"-c\\\", \\\"echo $1 >>$PWD/order\\\"]}\"; }; \
         config \".hooks = {prestart: [$(hook prestart)], createRuntime: [$(hook createRuntime)], createContainer: [$(hook createContainer)], \
         poststart: [$(hook poststart)], poststop: [$(hook poststop)]}\"; args true; rt run x; cat order",
    ),
    (
        "the_state_on_standard_input",
        "config --arg out $PWD/state.json '.annotations = {a: \"b\"} | .hooks.createRuntime = [{path: \"/bin/sh\", args: [\"sh\", \"-c\", \"cat >\" + $out]}]'; \
         args true; rt run x; jq -c '[.id, .status, .bundle, .annotations, .pid > 0]' state.json | sed \"s:$PWD::\"",
    ),
    (
        "environment_and_arguments",
        "config --arg out $PWD/env '.hooks.prestart = [{path: \"/bin/sh\", args: [\"zero\", \"-c\", \"env >\" + $out + \"; echo $0 $1 >>\" + $out, \"one\", \"two\"], env: [\"A=b\", \"PATH=/bin\"]}]'; \
         args true; rt run x; grep -v -e '^PWD=' -e '^_=' -e '^SHLVL=' -e '^OLDPWD=' env | sort",
    ),
    (
        "a_failing_hook_keeps_it_from_running",
        "config '.hooks.createRuntime = [{path: \"/bin/false\"}]'; args 'echo ran'; rt run x 2>err; echo $?; grep -o 'hook #0' err; rt list -q",
    ),
    (
        "a_hook_has_its_time",
        "config '.hooks.prestart = [{path: \"/bin/sleep\", args: [\"sleep\", \"1000\"], timeout: 1}]'; args 'echo ran'; rt run x >out 2>&1; echo $?; grep -x ran out || echo no",
    ),
    (
        "start_container_is_in_the_container",
        "config '.hooks.startContainer = [{path: \"/bin/sh\", args: [\"sh\", \"-c\", \"echo hook >/f; hostname >>/f\"]}] | .hostname = \"inside\"'; args 'cat /f'; rt run x",
    ),
];

pub const ERRORS: &[Case] = &[
    (
        "a_program_that_is_not_there",
        "config '.process.args = [\"nosuch\"]'; rt run x 2>err; echo $?; grep -o 'exec: \"*.*nosuch.*: executable file not found in $PATH' err | tr -d '\\\\' | head -c 30; rt list -q",
    ),
    (
        "a_program_that_may_not_be_executed",
        "config '.process.args = [\"/etc/passwd\"]'; rt run x 2>err; echo $?; grep -o 'permission denied' err",
    ),
    (
        "a_folder_that_is_none",
        "config '.process.cwd = \"/etc/passwd\"'; args true; rt run x 2>err; echo $?; grep -o 'not a directory' err | head -n 1",
    ),
    ("a_bundle_that_is_not_there", "rt run -b nowhere x 2>err; echo $?; grep -o 'no such file or directory' err"),
    ("json_that_is_broken", "echo '{' >config.json; rt run x >/dev/null 2>&1; echo $?"),
    (
        "an_id_that_is_taken_or_none",
        "args 'sleep 1000'; background; rt run x >/dev/null 2>&1; echo $?; rt run 'a/b' >/dev/null 2>&1; echo $?; rt list -q",
    ),
    (
        "commands_on_what_is_not_there",
        "for command in state start 'kill' pause resume delete 'exec x true' ps; do rt ${command%% *} nosuch >/dev/null 2>&1; echo $command $?; done",
    ),
    (
        "start_twice_and_exec_too_early",
        "args 'sleep 1000'; rt create x </dev/null >out 2>&1; rt start x; echo $?; rt start x >/dev/null 2>&1; echo $?",
    ),
];
