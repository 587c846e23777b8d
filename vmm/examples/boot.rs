//! Boots a kernel with its console on stderr, and says how it ended: `boot KERNEL [INITRAMFS [CMDLINE [MIB [VCPUS]]]]`.

use std::error::Error;

use katavm_devices::rng::Rng;
use katavm_vmm::{Microvm, MicrovmConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let config = MicrovmConfig {
        kernel: args.next().ok_or("usage: boot KERNEL [INITRAMFS [CMDLINE [MIB [VCPUS]]]]")?.into(),
        initramfs: args.next().filter(|path| !path.is_empty()).map(Into::into),
        cmdline: args.next().unwrap_or_default(),
        memory_mib: args.next().map_or(Ok(256), |mib| mib.parse())?,
        vcpus: args.next().map_or(Ok(1), |count| count.parse())?,
        ..Default::default()
    };
    let start = katavm_vmm::now();
    let vm = Microvm::builder(config).rng(Rng::new()?).build()?;
    vm.console().mirror(std::io::stderr());
    vm.start()?;
    let reason = vm.wait();
    let at = |moment: u64| moment.saturating_sub(start) / 1000;
    let timeline = vm.timeline();
    println!("{reason}");
    println!("{} exits", vm.exits());
    println!(
        "vm created {} us, first run {} us, ended {} us",
        at(timeline.vm_created()),
        at(timeline.first_run()),
        at(timeline.ended())
    );
    Ok(())
}
