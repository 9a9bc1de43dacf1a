//! The lines that led to bans, for `banctl why`: failures come in, the last ones per network are kept within a bound.

use std::collections::VecDeque;
use std::sync::Arc;

use hashbrown::HashMap;
use ipnet::IpNet;

use crate::engine::effect::JailId;
use crate::engine::time::Timestamp;

/// Bytes of lines kept at most, over all networks.
const BYTES_MAX: usize = 16 << 20;
/// Lines kept per network.
const LINES_MAX: usize = 10;
/// A line is kept up to here.
const LINE_BYTES_MAX: usize = 512;

/// One line that counted.
#[derive(Clone, Debug)]
pub struct Line {
    /// When.
    pub at: Timestamp,
    /// In which jail.
    pub jail: JailId,
    /// From which log.
    pub file: Arc<str>,
    /// By which pattern.
    pub pattern: Arc<str>,
    /// The line itself, as bytes became text.
    pub text: String,
}

/// Everything that is kept.
#[derive(Debug, Default)]
pub struct Evidence {
    lines: HashMap<IpNet, VecDeque<Line>>,
    order: VecDeque<IpNet>,
    bytes: usize,
}

impl Evidence {
    /// Keeps a line against a network.
    pub fn note(&mut self, net: IpNet, line: Line) {
        let mut line = line;
        if line.text.len() > LINE_BYTES_MAX {
            let mut end = LINE_BYTES_MAX;
            while !line.text.is_char_boundary(end) {
                end -= 1;
            }
            line.text.truncate(end);
            line.text.shrink_to_fit();
        }
        self.bytes += line.text.len();
        let order = &mut self.order;
        let lines = self.lines.entry(net).or_insert_with(|| {
            order.push_back(net);
            VecDeque::new()
        });
        lines.push_back(line);
        if lines.len() > LINES_MAX
            && let Some(oldest) = lines.pop_front()
        {
            self.bytes -= oldest.text.len();
        }
        while self.bytes > BYTES_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            if let Some(lines) = self.lines.remove(&oldest) {
                self.bytes -= lines.iter().map(|line| line.text.len()).sum::<usize>();
            }
        }
    }

    /// The lines against everything that touches `net`, oldest first.
    pub fn against(&self, net: &IpNet) -> Vec<&Line> {
        let mut found: Vec<&Line> = self
            .lines
            .iter()
            .filter(|(other, _)| net.contains(*other) || other.contains(net))
            .flat_map(|(_, lines)| lines)
            .collect();
        found.sort_by_key(|line| line.at);
        found
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn the_last_lines_per_network_are_kept_within_the_bound() {
        let mut evidence = Evidence::default();
        let line = |second: i64| Line {
            at: Timestamp::from_seconds(second),
            jail: JailId(0),
            file: "x".into(),
            pattern: "failregex[0]".into(),
            text: "é".repeat(1000),
        };
        for second in 0..20 {
            evidence.note("192.0.2.1/32".parse().unwrap(), line(second));
        }
        let kept = evidence.against(&"192.0.2.0/24".parse().unwrap());
        assert_eq!((kept.len(), kept[0].at.seconds(), kept[0].text.len()), (10, 10, 512));
        for number in 0..100_000u32 {
            evidence.note(IpNet::from(std::net::IpAddr::from(number.to_be_bytes())), line(1));
        }
        assert!(evidence.bytes <= BYTES_MAX && evidence.lines.len() <= BYTES_MAX / 512 + 1);
    }
}
