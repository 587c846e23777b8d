//! Generates the messages of Kubernetes' Container Runtime Interface from `proto/cri.proto`, without protoc.

use protobuf_codegen::Codegen;

fn main() {
    println!("cargo:rerun-if-changed=proto/cri.proto");
    Codegen::new().pure().include("proto").input("proto/cri.proto").cargo_out_dir("cri").run_from_script();
}
