//! Our table in the kernel: a layout comes in, one atomic transaction goes out; also tells whether the table is still as installed. Elements: see `elements`.

use rustix::io::Errno;

use super::model::{BASE_CHAIN, BanSet, Family, Model};
use super::rules;
use super::seen::{ChainSeen, RuleSeen, SetSeen};
use super::socket::{Link, Refusal};
use super::wire::{Batch, CREATE, kind};
use super::{Error, Layout};

/// How often an install starts anew because somebody else changed any rules between its reading and its writing; then it
/// goes ahead, as the kernel still refuses all of it if the change was in our table.
const RESTARTS_MAX: u32 = 3;
/// A counter costs 16 bytes for each element and processor, and some time: measured on 2 processors 0.38 s instead of
/// 0.15 s for 100,000 bans and 8.6 us instead of 5.5 us for one (without `destroy` 0.65 s and 12.7 us, which is too much).
/// At 16 processors a ban takes 350 bytes instead of 100.
const COUNTING_CPUS_MAX: usize = 16;
/// `NFT_SET_ANONYMOUS`: belongs to a rule and goes with it.
const SET_ANONYMOUS: u32 = 1;
/// `NFT_TABLE_F_DORMANT`.
const TABLE_DORMANT: u32 = 1;

/// The kernel's packet filter, seen through one long-lived socket; not to be shared between threads.
#[derive(Debug)]
pub struct Kernel {
    pub(super) link: Link,
    pub(super) batch: Batch,
    pub(super) model: Model,
    /// True if new sets count the packets of each element.
    counters: bool,
    /// True if the kernel knows `destroy element` (6.3): delete without complaint.
    pub(super) destroys: bool,
    /// Every rule of our table as the kernel listed it when we last changed rules.
    rules_seen: Vec<RuleSeen>,
}

impl Kernel {
    /// Opens the kernel's packet filter of this network namespace and finds out what it can do.
    ///
    /// # Errors
    /// [`Error::Permission`] without CAP_NET_ADMIN, [`Error::Unsupported`] without nf_tables.
    pub fn open() -> Result<Self, Error> {
        let mut kernel = Self::open_portable()?;
        kernel.destroys = kernel.scratch(false, true)?.is_none();
        kernel.counters = kernel.destroys && cpus() <= COUNTING_CPUS_MAX && kernel.scratch(true, true)?.is_none();
        Ok(kernel)
    }

    /// The same with nothing newer than Linux 6.1 and without counters; a fifth slower.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_portable() -> Result<Self, Error> {
        let mut kernel = Self {
            link: Link::open()?,
            batch: Batch::default(),
            model: Model::default(),
            counters: false,
            destroys: false,
            rules_seen: Vec::new(),
        };
        match kernel.scratch(false, false)? {
            None => Ok(kernel),
            Some(Errno::PERM) => Err(Error::Permission),
            Some(Errno::OPNOTSUPP | Errno::AFNOSUPPORT | Errno::INVAL) => Err(Error::Unsupported("nf_tables")),
            Some(errno) => Err(Error::Kernel { doing: "trying out nf_tables", errno }),
        }
    }

    /// The same without counters: a third less time for each ban, less memory, and nobody learns what a ban stopped.
    #[must_use]
    pub fn uncounted(mut self) -> Self {
        self.counters = false;
        self
    }

    /// True if bans made from now on count the packets they stop; if not, [`super::Held::packets`] stays 0.
    pub fn counts(&self) -> bool {
        self.counters
    }

    /// The rule set that should be in the kernel now, as [`super::describe`] writes it, with the prefix lengths in use.
    pub fn describe(&self) -> String {
        super::text::text_of(&self.model)
    }

    /// The number under which [`super::Monitor`] reports the changes made here.
    pub fn port_id(&self) -> u32 {
        self.link.port_id()
    }

    /// Makes the kernel hold exactly this layout, in one atomic transaction: no packet sees a half of it.
    ///
    /// Elements stay, also those of a table that an earlier process left behind. Sets and chains that the layout does not
    /// have any more are deleted with their elements; a set of another kind than ours is made anew, empty.
    ///
    /// # Errors
    /// [`Error::Layout`], [`Error::Owned`], [`Error::Permission`], [`Error::Unsupported`], or the kernel's answer; the
    /// kernel is unchanged then.
    pub fn install(&mut self, layout: &Layout) -> Result<(), Error> {
        layout.check()?;
        for _ in 0..RESTARTS_MAX {
            match self.try_install(layout, true) {
                Err(Error::Kernel { errno: Errno::RESTART, .. }) => {}
                outcome => return outcome,
            }
        }
        self.try_install(layout, false)
    }

    /// Guarded, it is refused if any rules of anybody change between its reading and its writing.
    fn try_install(&mut self, layout: &Layout, guarded: bool) -> Result<(), Error> {
        let mut model = Model::new(layout, self.counters);
        let generation = self.generation()?;
        let flags = self.table_flags(&model.table)?;
        let exists = flags.is_some();
        let (sets, chains) = if exists { self.seen(&model.table)? } else { Default::default() };
        let doomed = adopt(&mut model, &sets);
        let b = &mut self.batch;
        b.begin(guarded.then_some(generation));
        b.message(kind::NEWTABLE, CREATE, |b| b.text(1, &model.table));
        if exists {
            put_removals(b, &model, &doomed, &chains);
        }
        rules::put_allow_set(b, &model.table, Family::V4, &model.allow4);
        rules::put_allow_set(b, &model.table, Family::V6, &model.allow6);
        for set in model.sets.iter().filter(|set| !set.stands) {
            rules::put_ban_set(b, &model.table, set);
        }
        for chain in model.chains() {
            rules::put_chain(b, &model.table, &chain, chain == BASE_CHAIN);
        }
        let first_rule = model.rules().iter().map(|rule| rules::put_rule(b, &model.table, rule)).min();
        let refusals = self.link.commit(b).map_err(|errno| Error::Kernel { doing: "installing the table", errno })?;
        if let Some(refusal) = refusals.first() {
            return Err(self.why_refused(&model.table, *refusal, first_rule));
        }
        model.sets.iter_mut().for_each(|set| set.stands = true);
        self.model = model;
        if flags.is_some_and(|flags| flags & TABLE_DORMANT != 0) {
            self.wake()?;
        }
        self.remember_rules()
    }

    /// Deletes a table with all its bans; no error if there is none.
    ///
    /// # Errors
    /// [`Error::Owned`], [`Error::Permission`], or the kernel's answer.
    pub fn remove(&mut self, table: &str) -> Result<(), Error> {
        let b = &mut self.batch;
        b.begin(None);
        // Makes the deletion legal.
        b.message(kind::NEWTABLE, CREATE, |b| b.text(1, table));
        b.message(kind::DELTABLE, 0, |b| b.text(1, table));
        let refusals = self.link.commit(b).map_err(|errno| cannot_ask("deleting the table", errno))?;
        match refusals.first().map(|refusal| refusal.errno) {
            None => Ok(()),
            Some(Errno::PERM) => Err(self.why_forbidden(table)),
            Some(errno) => Err(cannot_ask("deleting the table", errno)),
        }
    }

    /// Puts the rules of a table into force that somebody made dormant; a transaction that also makes a base chain may not.
    fn wake(&mut self) -> Result<(), Error> {
        let b = &mut self.batch;
        b.begin(None);
        b.message(kind::NEWTABLE, CREATE, |b| {
            b.text(1, &self.model.table);
            b.u32(2, 0);
        });
        let refusals = self.link.commit(b).map_err(|errno| cannot_ask("waking the table", errno))?;
        refusals.first().map_or(Ok(()), |refusal| Err(cannot_ask("waking the table", refusal.errno)))
    }

    fn why_refused(&mut self, table: &str, refusal: Refusal, first_rule: Option<u32>) -> Error {
        match refusal.errno {
            Errno::PERM => self.why_forbidden(table),
            // Everything a rule names is made in the same transaction, so only an expression can be missing.
            Errno::NOENT if first_rule.is_some_and(|first| refusal.seq >= first) => {
                Error::Unsupported("nftables expression we use (nft_reject_inet)")
            }
            Errno::OPNOTSUPP | Errno::AFNOSUPPORT => Error::Unsupported("nf_tables for the family inet"),
            errno => Error::Kernel { doing: "installing the table", errno },
        }
    }

    /// "Not permitted" is also what the kernel says about a table that another process owns.
    pub(super) fn why_forbidden(&mut self, table: &str) -> Error {
        match self.generation() {
            Ok(_) => Error::Owned(table.to_owned()),
            Err(why) => why,
        }
    }

    /// True if table, chains, sets and rules are as they were installed; elements are not looked at (see `dump`).
    ///
    /// Costs some 10 us for each chain and set.
    ///
    /// # Errors
    /// Whatever keeps us from asking.
    pub fn is_intact(&mut self) -> Result<bool, Error> {
        let table = self.model.table.clone();
        if self.table_flags(&table)? != Some(0) {
            return Ok(false);
        }
        let (sets, chains) = self.seen(&table)?;
        let set_is_right = |set: &BanSet| sets.iter().any(|seen| seen.is_ban_set(set));
        let allow_is_right = |family| sets.iter().any(|seen| seen.is_allow_set(family));
        let chain_is_right = |name: &String| chains.iter().any(|chain| chain.name == *name && chain.is_right());
        Ok(self.model.sets.iter().filter(|set| set.stands).all(set_is_right)
            && [Family::V4, Family::V6].into_iter().all(allow_is_right)
            && self.model.chains().iter().all(chain_is_right)
            && self.rules_seen.len() == self.rules_wanted()
            && self.list_rules()? == self.rules_seen)
    }

    fn rules_wanted(&self) -> usize {
        self.model.rules().len() - self.model.sets.iter().filter(|set| !set.stands).count()
    }

    /// To be called after each change of rules.
    pub(super) fn remember_rules(&mut self) -> Result<(), Error> {
        self.rules_seen = self.list_rules()?;
        Ok(())
    }

    /// The number the kernel gives to the present state of all rules.
    pub(super) fn generation(&mut self) -> Result<u32, Error> {
        let mut generation = 0;
        self.batch.question(kind::GETGEN, 0, |_| {});
        let answered = self.link.ask(&self.batch, |m| generation = m.attributes().u32(1).unwrap_or_default());
        answered.map_err(|errno| cannot_ask("asking for the generation of the rules", errno))?;
        Ok(generation)
    }

    /// Tries something in a table that is made and deleted in one transaction, so that no packet ever sees it.
    fn scratch(&mut self, counted: bool, destroys: bool) -> Result<Option<Errno>, Error> {
        let table = format!("band-scratch-{}", self.link.port_id());
        let set = BanSet { name: "probe".to_owned(), scope: 0, family: Family::V4, length: 32, counted, stands: false };
        let b = &mut self.batch;
        b.begin(None);
        b.message(kind::NEWTABLE, CREATE, |b| b.text(1, &table));
        rules::put_ban_set(b, &table, &set);
        let put_key = |b: &mut Batch, &(): &()| rules::put_key(b, &[0; 4]);
        if destroys {
            rules::put_elements(b, kind::DESTROYSETELEM, &table, &set.name, &[()], put_key);
        }
        rules::put_elements(b, kind::NEWSETELEM, &table, &set.name, &[()], put_key);
        b.message(kind::DELTABLE, 0, |b| b.text(1, &table));
        let refusals = self.link.commit(b).map_err(|errno| cannot_ask("trying out nf_tables", errno))?;
        Ok(refusals.first().map(|refusal| refusal.errno))
    }
}

/// How many processors the kernel prepares for; it keeps a counter for each.
fn cpus() -> usize {
    let possible = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    let last = possible.trim().rsplit(['-', ',']).next().and_then(|last| last.parse::<usize>().ok());
    last.map_or_else(|| std::thread::available_parallelism().map_or(usize::MAX, usize::from), |last| last + 1)
}

/// All rules go first, then sets and maps, then chains: nothing can be deleted that something else refers to.
fn put_removals(b: &mut Batch, model: &Model, doomed: &[&str], chains: &[ChainSeen]) {
    b.message(kind::DELRULE, 0, |b| b.text(1, &model.table));
    for name in doomed {
        b.message(kind::DELSET, 0, |b| {
            b.text(1, &model.table);
            b.text(2, name);
        });
    }
    let wanted = model.chains();
    for chain in chains.iter().filter(|chain| !(wanted.contains(&chain.name) && chain.is_right())) {
        b.message(kind::DELCHAIN, 0, |b| {
            b.text(1, &model.table);
            b.text(3, &chain.name);
        });
    }
}

/// Takes over the kernel's sets that are as we want them; gives the names of those that must go.
fn adopt<'a>(model: &mut Model, sets: &'a [SetSeen]) -> Vec<&'a str> {
    let mut doomed = Vec::new();
    for seen in sets.iter().filter(|seen| seen.flags & SET_ANONYMOUS == 0) {
        let stays = match model.set_named(&seen.name) {
            Some(set) => {
                let is_usual = model.find_set(set.scope, set.family, set.length).is_some();
                // A length nobody is banned by any more would cost each packet a look-up for nothing.
                let stays = seen.is_ban_set(&set) && (is_usual || seen.elements != Some(0));
                if stays {
                    let at = model.set_for(set.scope, set.family, set.length);
                    model.sets[at].counted = seen.has_counter;
                    model.sets[at].stands = true;
                }
                stays
            }
            None => [Family::V4, Family::V6].into_iter().any(|family| seen.is_allow_set(family)),
        };
        if !stays {
            doomed.push(seen.name.as_str());
        }
    }
    doomed
}

/// What it means that a question is not answered.
pub(super) fn cannot_ask(doing: &'static str, errno: Errno) -> Error {
    match errno {
        Errno::PERM => Error::Permission,
        Errno::AGAIN => Error::Silent(doing),
        errno => Error::Kernel { doing, errno },
    }
}
