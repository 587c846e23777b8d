//! A request of the guest, copied out piece by piece.

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::wire::{self, ExtHeader, InHeader};
use crate::virtio::queue::Buffers;

/// Groups that are taken from one request at most; Linux sends one.
const MAX_GROUPS: u32 = 32;

/// Header and body of one request. Each byte is read from guest memory once.
pub struct Request<'m> {
    /// The header.
    pub header: InHeader,
    /// What is left of the body.
    pub body: Buffers<'m>,
    extensions: Buffers<'m>,
}

impl<'m> Request<'m> {
    /// Reads the header off the front of `body`. None when that is too short to be answered at all.
    pub fn parse(mut body: Buffers<'m>) -> Option<Self> {
        let mut header = InHeader::default();
        body.read_exact(header.as_mut_bytes()).ok()?;
        let end = body.remaining();
        let extensions = body.clone().split_off(end);
        Some(Self { header, body, extensions })
    }

    /// Cuts the body to the length in the header, and the extensions off its end.
    ///
    /// # Errors
    /// EINVAL when a length contradicts the buffers.
    pub fn delimit(&mut self) -> Result<(), Errno> {
        let len = (self.header.len as usize).checked_sub(wire::IN_HEADER).ok_or(Errno::INVAL)?;
        if len > self.body.remaining() {
            return Err(Errno::INVAL);
        }
        let _beyond = self.body.split_off(len);
        let ext = usize::from(self.header.total_extlen) * 8;
        self.extensions = self.body.split_off(len.checked_sub(ext).ok_or(Errno::INVAL)?);
        Ok(())
    }

    /// Reads one message.
    ///
    /// # Errors
    /// EINVAL when the body is too short.
    pub fn read<T: FromBytes + IntoBytes + Default>(&mut self) -> Result<T, Errno> {
        let mut value = T::default();
        self.body.read_exact(value.as_mut_bytes()).map_err(|_| Errno::INVAL)?;
        Ok(value)
    }

    /// Reads the rest of the body.
    ///
    /// # Errors
    /// E2BIG when that is more than `max` bytes.
    pub fn rest(&mut self, max: usize) -> Result<Vec<u8>, Errno> {
        let len = self.body.remaining();
        if len > max {
            return Err(Errno::TOOBIG);
        }
        let mut bytes = vec![0; len];
        self.body.read_exact(&mut bytes).map_err(|_| Errno::INVAL)?;
        Ok(bytes)
    }

    /// The groups beside its own that count for the caller (`FUSE_CREATE_SUPP_GROUP`).
    ///
    /// # Errors
    /// EINVAL when the extensions are malformed.
    pub fn groups(&mut self) -> Result<Vec<u32>, Errno> {
        let mut groups = Vec::new();
        while self.extensions.remaining() >= size_of::<ExtHeader>() {
            let header: ExtHeader = read_from(&mut self.extensions)?;
            let len = (header.size as usize).checked_sub(size_of::<ExtHeader>()).ok_or(Errno::INVAL)?;
            if len > self.extensions.remaining() {
                return Err(Errno::INVAL);
            }
            let next = self.extensions.split_off(len);
            if header.kind == wire::EXT_GROUPS {
                let count: u32 = read_from(&mut self.extensions)?;
                if count > MAX_GROUPS {
                    return Err(Errno::INVAL);
                }
                for _ in 0..count {
                    groups.push(read_from(&mut self.extensions)?);
                }
            }
            self.extensions = next;
        }
        Ok(groups)
    }
}

fn read_from<T: FromBytes + IntoBytes + Default>(buffers: &mut Buffers<'_>) -> Result<T, Errno> {
    let mut value = T::default();
    buffers.read_exact(value.as_mut_bytes()).map_err(|_| Errno::INVAL)?;
    Ok(value)
}

/// Writes one message of the reply.
///
/// # Errors
/// EINVAL when the guest left too little room.
pub fn put<T: IntoBytes + Immutable>(out: &mut Buffers<'_>, value: &T) -> Result<(), Errno> {
    put_bytes(out, value.as_bytes())
}

/// Writes bytes of the reply.
///
/// # Errors
/// EINVAL when the guest left too little room.
pub fn put_bytes(out: &mut Buffers<'_>, bytes: &[u8]) -> Result<(), Errno> {
    out.write_all(bytes).map_err(|_| Errno::INVAL)
}
