//! The host kernel's random bytes, straight into guest memory.

use std::io;

use crate::virtio::queue::Buffers;

/// No request gets more than this many bytes, however long its buffers are. The driver sees the length
/// that it got; Linux asks for 64 bytes at a time.
pub const MAX_BYTES: usize = 64 * 1024;

/// Fills the first [`MAX_BYTES`] bytes of `buffers` by getrandom(2). Nothing is allocated by length.
///
/// # Errors
/// Of getrandom. What was written before is in `buffers.consumed()`.
pub fn fill(buffers: &mut Buffers<'_>) -> io::Result<()> {
    loop {
        let wanted = MAX_BYTES.saturating_sub(buffers.consumed());
        let vectors = buffers.iovecs(wanted);
        let Some(vector) = vectors.first() else { return Ok(()) };
        // SAFETY: the vector is guest memory that stays mapped as long as `buffers` lives. The guest may
        // access it meanwhile, but no Rust reference to it exists.
        let got = unsafe { libc::getrandom(vector.iov_base, vector.iov_len, 0) };
        match usize::try_from(got) {
            Ok(got) => buffers.consume(got),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
