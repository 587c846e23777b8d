//! Queries to name servers, as they travel between agent and host.

/// Bytes of a query or an answer at most.
pub const LONGEST: usize = 32 * 1024;
/// The port of a name server.
pub const PORT: u16 = 53;
