//! Our table as the kernel lists it: questions go out, what is there comes back as values. Changes nothing, lists no elements.

use rustix::io::Errno;

use super::Error;
use super::kernel::{Kernel, cannot_ask};
use super::model::{BASE_CHAIN, BASE_PRIORITY, BanSet, Family, allow_set_name};
use super::rules::{self, SET_INTERVAL, SET_TIMEOUT};
use super::wire::{Attributes, DUMP, kind};

/// How many elements a set has, those included that ended but were not collected yet.
pub(super) const SET_COUNT: u16 = 20;
/// What the kernel says about a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RuleSeen {
    pub chain: String,
    pub handle: u64,
    /// A rule that is replaced keeps its number.
    pub expressions: Vec<u8>,
}

/// What the kernel says about a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SetSeen {
    pub name: String,
    pub flags: u32,
    pub key_type: u32,
    pub has_counter: bool,
    /// A limit on the number of elements, or a timeout for all elements; ours have neither.
    pub is_limited: bool,
    /// Only kernels from about 6.18 on tell.
    pub elements: Option<u32>,
}

/// What the kernel says about a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ChainSeen {
    pub name: String,
    /// Hook, priority, policy and type of a base chain.
    pub hook: Option<(u32, i32, u32, String)>,
}

impl Kernel {
    /// Every rule of our table in its order.
    pub(super) fn list_rules(&mut self) -> Result<Vec<RuleSeen>, Error> {
        let (table, mut rules) = (&self.model.table, Vec::new());
        self.batch.question(kind::GETRULE, DUMP, |b| b.text(1, table));
        let answered = self.link.ask(&self.batch, |message| {
            let attributes = message.attributes();
            if attributes.text(1) == table {
                let handle = attributes.u64(3).unwrap_or_default();
                let expressions = attributes.value(4).unwrap_or_default().to_vec();
                rules.push(RuleSeen { chain: attributes.text(2).to_owned(), handle, expressions });
            }
        });
        answered.map_err(|errno| cannot_ask("listing rules", errno))?;
        Ok(rules)
    }

    /// The sets and the chains of a table.
    pub(super) fn seen(&mut self, table: &str) -> Result<(Vec<SetSeen>, Vec<ChainSeen>), Error> {
        let (mut sets, mut chains) = (Vec::new(), Vec::new());
        self.batch.question(kind::GETSET, DUMP, |b| b.text(1, table));
        let answered = self.link.ask(&self.batch, |message| {
            if message.attributes().text(1) == table {
                sets.push(SetSeen::read(&message.attributes()));
            }
        });
        answered.map_err(|errno| cannot_ask("listing sets", errno))?;
        self.batch.question(kind::GETCHAIN, DUMP, |b| b.text(1, table));
        let answered = self.link.ask(&self.batch, |message| {
            if message.attributes().text(1) == table {
                chains.push(ChainSeen::read(&message.attributes()));
            }
        });
        answered.map_err(|errno| cannot_ask("listing chains", errno))?;
        Ok((sets, chains))
    }

    /// The flags of a table, `None` if there is no such table.
    pub(super) fn table_flags(&mut self, table: &str) -> Result<Option<u32>, Error> {
        let mut flags = None;
        self.batch.question(kind::GETTABLE, 0, |b| b.text(1, table));
        match self.link.ask(&self.batch, |message| flags = message.attributes().u32(2)) {
            Ok(_) => Ok(flags),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(cannot_ask("looking for the table", errno)),
        }
    }
}

impl SetSeen {
    fn read(attributes: &Attributes<'_>) -> Self {
        let size = attributes.within(9).u32(1).unwrap_or_default();
        Self {
            name: attributes.text(2).to_owned(),
            flags: attributes.u32(3).unwrap_or_default(),
            key_type: attributes.u32(4).unwrap_or_default(),
            has_counter: attributes.within(17).text(1) == "counter",
            is_limited: size != 0 || attributes.u64(11).unwrap_or_default() != 0,
            elements: attributes.u32(SET_COUNT),
        }
    }

    /// With or without a counter: that is no reason to lose its elements.
    pub fn is_ban_set(&self, set: &BanSet) -> bool {
        self.name == set.name
            && self.flags == SET_TIMEOUT
            && self.key_type == rules::key_type(set.family)
            && !self.is_limited
    }

    pub fn is_allow_set(&self, family: Family) -> bool {
        self.name == allow_set_name(family)
            && self.flags == SET_INTERVAL
            && self.key_type == rules::key_type(family)
            && !self.is_limited
    }
}

impl ChainSeen {
    fn read(attributes: &Attributes<'_>) -> Self {
        let hook = attributes.value(4).map(|_| {
            let hook = attributes.within(4);
            let priority = hook.u32(2).unwrap_or_default().cast_signed();
            let policy = attributes.u32(5).unwrap_or_default();
            (hook.u32(1).unwrap_or_default(), priority, policy, attributes.text(7).to_owned())
        });
        Self { name: attributes.text(3).to_owned(), hook }
    }

    /// True if a chain of this name should be as it is.
    pub fn is_right(&self) -> bool {
        match &self.hook {
            Some((hook, priority, policy, kind)) => {
                self.name == BASE_CHAIN && (*hook, *priority, *policy) == (0, BASE_PRIORITY, 1) && kind == "filter"
            }
            None => self.name != BASE_CHAIN,
        }
    }
}
