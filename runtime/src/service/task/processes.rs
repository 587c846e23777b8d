//! What the answer to `Pids` has besides pids: the agent's description of the process, under a type name of ours.

use katavm_protocol::agent::Process;
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;

/// A description.
pub fn pack(process: &Process) -> protobuf::Result<Any> {
    Any::pack(process)
}

/// The description in an answer.
pub fn unpack(info: &Any) -> Option<Process> {
    Process::parse_from_bytes(&info.value).ok()
}
