//! Netlink as bytes: values come in, messages of one transaction go out, and the other way round. Knows no rules, sends nothing.
//!
//! Headers are in host order, everything nftables puts inside attributes is big-endian.

/// Message numbers of nf_tables (`linux/netfilter/nf_tables.h`), as they are called there.
pub(super) mod kind {
    pub const NEWTABLE: u8 = 0;
    pub const GETTABLE: u8 = 1;
    pub const DELTABLE: u8 = 2;
    pub const NEWCHAIN: u8 = 3;
    pub const GETCHAIN: u8 = 4;
    pub const DELCHAIN: u8 = 5;
    pub const NEWRULE: u8 = 6;
    pub const GETRULE: u8 = 7;
    pub const DELRULE: u8 = 8;
    pub const NEWSET: u8 = 9;
    pub const GETSET: u8 = 10;
    pub const DELSET: u8 = 11;
    pub const NEWSETELEM: u8 = 12;
    pub const GETSETELEM: u8 = 13;
    pub const DELSETELEM: u8 = 14;
    pub const NEWGEN: u8 = 15;
    pub const GETGEN: u8 = 16;
    pub const DESTROYSETELEM: u8 = 30;
}

/// The netfilter subsystem number of nf_tables.
pub(super) const SUBSYSTEM: u8 = 10;
/// `NFPROTO_INET`: IPv4 and IPv6 in one table.
const FAMILY_INET: u8 = 1;
const REQUEST: u16 = 1;
/// Several messages answer one request.
pub(super) const MULTI: u16 = 2;
/// What was listed changed while it was listed.
pub(super) const DUMP_INTERRUPTED: u16 = 0x10;
/// List everything (`NLM_F_ROOT | NLM_F_MATCH`).
pub(super) const DUMP: u16 = 0x300;
/// Create what is missing; no error if it is there already.
pub(super) const CREATE: u16 = 0x400;
/// Put a rule behind the others of its chain.
pub(super) const APPEND: u16 = 0x800;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
/// A refusal, or an acknowledgement (number 0).
pub(super) const ERROR: u16 = 2;
/// The end of a list.
pub(super) const DONE: u16 = 3;
const HEADER_BYTES: usize = 16;
const NESTED: u16 = 0x8000;
const ATTRIBUTE_KIND_MASK: u16 = 0x3fff;

/// Messages to be sent in one go; the buffer is used again and again, the sequence numbers never.
#[derive(Debug, Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// The number of the last message written.
    seq: u32,
    /// The number before the first message of this batch.
    before: u32,
}

impl Batch {
    /// Forgets the old messages and opens a transaction; with a generation, it is refused if anything changed since.
    pub fn begin(&mut self, generation: Option<u32>) {
        self.start();
        self.header(BATCH_BEGIN, REQUEST, 0, u16::from(SUBSYSTEM), |b| {
            if let Some(generation) = generation {
                b.u32(1, generation);
            }
        });
    }

    /// Forgets the old messages and writes one question that is not part of a transaction.
    pub fn question(&mut self, kind: u8, flags: u16, build: impl FnOnce(&mut Self)) {
        self.start();
        self.message(kind, flags, build);
    }

    /// Closes the transaction and gives its bytes.
    pub fn end(&mut self) -> &[u8] {
        self.header(BATCH_END, REQUEST, 0, u16::from(SUBSYSTEM), |_| {});
        &self.bytes
    }

    /// The bytes as they are.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// True if an answer with this number belongs to the messages written since the last start.
    pub fn has(&self, seq: u32) -> bool {
        seq.wrapping_sub(self.before).wrapping_sub(1) < self.seq.wrapping_sub(self.before)
    }

    fn start(&mut self) {
        self.bytes.clear();
        self.before = self.seq;
    }

    /// Writes one message of nf_tables and gives its sequence number.
    pub fn message(&mut self, kind: u8, flags: u16, build: impl FnOnce(&mut Self)) -> u32 {
        self.header(u16::from(SUBSYSTEM) << 8 | u16::from(kind), REQUEST | flags, FAMILY_INET, 0, build)
    }

    fn header(&mut self, kind: u16, flags: u16, family: u8, id: u16, build: impl FnOnce(&mut Self)) -> u32 {
        let at = self.bytes.len();
        self.seq = self.seq.wrapping_add(1);
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&self.seq.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&id.to_be_bytes());
        build(self);
        // A transaction is cut at 2000 elements, far below 4 GiB.
        let length = u32::try_from(self.bytes.len() - at).unwrap_or(u32::MAX);
        self.bytes[at..at + 4].copy_from_slice(&length.to_ne_bytes());
        self.seq
    }

    /// Writes an attribute that holds attributes; the caller keeps it below 64 KiB, more does not fit in its length.
    pub fn nest(&mut self, kind: u16, build: impl FnOnce(&mut Self)) {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        build(self);
        let length = u16::try_from(self.bytes.len() - at).unwrap_or(u16::MAX);
        self.bytes[at..at + 2].copy_from_slice(&length.to_ne_bytes());
    }

    /// Writes an attribute of raw bytes.
    pub fn raw(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Writes a big-endian number of 32 bits.
    pub fn u32(&mut self, kind: u16, value: u32) {
        self.raw(kind, &value.to_be_bytes());
    }

    /// Writes a big-endian number of 64 bits.
    pub fn u64(&mut self, kind: u16, value: u64) {
        self.raw(kind, &value.to_be_bytes());
    }

    /// Writes a text with the zero byte the kernel wants at its end.
    pub fn text(&mut self, kind: u16, value: &str) {
        let length = u16::try_from(value.len() + 5).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// One message as it was received.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message<'a> {
    /// [`ERROR`], [`DONE`], or the subsystem in the upper byte and the number of the message in the lower.
    pub kind: u16,
    /// The flags of its header.
    pub flags: u16,
    /// The number of the request it answers.
    pub seq: u32,
    /// The port of who caused it.
    pub port_id: u32,
    /// What follows the netlink header.
    pub body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The attributes behind netfilter's own header of 4 bytes.
    pub fn attributes(&self) -> Attributes<'a> {
        attributes(self.body.get(4..).unwrap_or_default())
    }

    /// The error number of an [`ERROR`] message; 0 is an acknowledgement.
    pub fn errno(&self) -> i32 {
        let number = self.body.first_chunk::<4>().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
        number.saturating_neg()
    }
}

/// The messages of one datagram; a torn one at the end is left out.
pub(super) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let word = |at: usize| bytes.get(at..at + 4)?.first_chunk::<4>().map(|word| u32::from_ne_bytes(*word));
        let half = |at: usize| bytes.get(at..at + 2)?.first_chunk::<2>().map(|half| u16::from_ne_bytes(*half));
        let length = word(0)? as usize;
        let body = bytes.get(HEADER_BYTES..length)?;
        let message = Message { kind: half(4)?, flags: half(6)?, seq: word(8)?, port_id: word(12)?, body };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in `bytes`, with the flag bits of their kind cleared.
pub(super) fn attributes(bytes: &[u8]) -> Attributes<'_> {
    Attributes { rest: bytes }
}

/// See [`attributes`].
#[derive(Clone, Debug)]
pub(super) struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let half = |at: usize| self.rest.get(at..at + 2)?.first_chunk::<2>().map(|half| u16::from_ne_bytes(*half));
        let length = usize::from(half(0)?);
        let kind = half(2)? & ATTRIBUTE_KIND_MASK;
        let value = self.rest.get(4..length)?;
        self.rest = self.rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

impl<'a> Attributes<'a> {
    /// The value of the first attribute of this kind.
    pub fn value(&self, wanted: u16) -> Option<&'a [u8]> {
        self.clone().find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
    }

    /// The attributes inside the first attribute of this kind; none if there is no such attribute.
    pub fn within(&self, wanted: u16) -> Attributes<'a> {
        attributes(self.value(wanted).unwrap_or_default())
    }

    /// A big-endian number of 32 bits.
    pub fn u32(&self, wanted: u16) -> Option<u32> {
        Some(u32::from_be_bytes(*self.value(wanted)?.first_chunk()?))
    }

    /// A big-endian number of 64 bits.
    pub fn u64(&self, wanted: u16) -> Option<u64> {
        Some(u64::from_be_bytes(*self.value(wanted)?.first_chunk()?))
    }

    /// A text without its zero byte; empty if there is none or if it is not UTF-8.
    pub fn text(&self, wanted: u16) -> &'a str {
        let value = self.value(wanted).unwrap_or_default();
        std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut batch = Batch::default();
        batch.begin(Some(7));
        let seq = batch.message(kind::NEWSET, CREATE, |b| {
            b.text(1, "band");
            b.nest(2, |b| {
                b.u32(3, 0x0102_0304);
                b.u64(4, 5);
                b.raw(5, b"xyz");
            });
        });
        let bytes = batch.end().to_vec();
        let got: Vec<_> = messages(&bytes).collect();
        assert_eq!(got.iter().map(|m| m.kind).collect::<Vec<_>>(), [16, 0x0a09, 17]);
        assert_eq!(got[1].seq, seq);
        assert_eq!(got[0].attributes().u32(1), Some(7));
        let attributes = got[1].attributes();
        assert_eq!(attributes.text(1), "band");
        assert_eq!(attributes.within(2).u32(3), Some(0x0102_0304));
        assert_eq!(attributes.within(2).u64(4), Some(5));
        assert_eq!(attributes.within(2).value(5), Some(&b"xyz"[..]));
        assert_eq!(attributes.value(9), None);
    }

    #[test]
    fn only_the_numbers_of_this_batch_are_its_own() {
        let mut batch = Batch { seq: u32::MAX - 1, ..Batch::default() };
        batch.begin(None);
        batch.message(kind::NEWTABLE, 0, |_| {});
        batch.end();
        assert_eq!([u32::MAX - 1, u32::MAX, 0, 1, 2].map(|seq| batch.has(seq)), [false, true, true, true, false]);
    }

    #[test]
    fn torn_bytes_end_the_reading() {
        let mut batch = Batch::default();
        batch.question(kind::GETGEN, 0, |b| b.text(1, "band"));
        let bytes = batch.bytes().to_vec();
        for length in 0..bytes.len() {
            assert_eq!(messages(&bytes[..length]).count(), 0, "{length}");
            let _ = attributes(&bytes[..length]).count();
        }
        assert_eq!(messages(&bytes).count(), 1);
    }
}
