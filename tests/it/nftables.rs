use crate::netns::private;
use band::enforce::nftables::*;
use std::time::Instant;
#[test]
#[ignore]
#[allow(clippy::print_stdout, reason = "numbers")]
fn measure() {
    private(|| {
        for counters in [false, true, false, true] {
            let mut kernel = Kernel::open().unwrap();
            let _ = counters;
            let layout = Layout {
                table: "band".to_owned(),
                allow: vec![],
                scopes: vec![Scope { name: "all".into(), action: Action::Drop, ports: Ports::All }],
            };
            kernel.install(&layout).unwrap();
            let op = |i: u32, base: u32| Op::Ban {
                scope: "all".into(),
                net: std::net::IpAddr::from(std::net::Ipv4Addr::from(base + i)).into(),
                timeout: Some(band::engine::time::Span(3_600_000)),
            };
            let ops: Vec<_> = (0..100_000).map(|i| op(i, 0x0a00_0000)).collect();
            let start = Instant::now();
            assert_eq!(kernel.apply(&ops), []);
            let bulk = start.elapsed();
            let start = Instant::now();
            assert_eq!(kernel.apply(&ops), []);
            let again = start.elapsed();
            let mut times = vec![];
            for i in 0..20_000 {
                let op = op(i, 0x0b00_0000);
                let start = Instant::now();
                assert_eq!(kernel.apply(std::slice::from_ref(&op)), []);
                times.push(start.elapsed());
            }
            times.sort();
            let start = Instant::now();
            let n = kernel.dump().unwrap().len();
            println!(
                "counters {counters}: bulk {bulk:?} again {again:?} single p50 {:?} p99 {:?} max {:?} dump {n} {:?}",
                times[10_000],
                times[19_800],
                times[19_999],
                start.elapsed()
            );
            crate::netns::run("nft", "delete table inet band");
        }
    });
}
