use super::*;

#[test]
fn what_is_out_of_date_or_no_record_does_not_count() {
    let now = 1_800_000_000;
    for (host, value, expected) in [
        ("x.org", "1799999999", Some(now - 1)),
        ("x.org", "1799913600", Some(now - LIFE_SECONDS)),
        ("x.org", "1799913599", None),
        ("x.org", "1900000000", Some(now)),
        ("x.org", "", None),
        ("x.org", "-5", None),
        ("x.org", "soon", None),
        ("", "1799999999", None),
        (&"x".repeat(256), "1799999999", None),
    ] {
        assert_eq!(parse(host, value.as_bytes(), now), expected, "{host} {value}");
    }
}

#[test]
fn a_full_table_keeps_those_it_has() {
    let mut kept = Kept::default();
    for n in 0..MAX_HOMESERVERS {
        assert!(kept.put(&format!("n{n}.example.org"), 1_000_000));
    }
    assert!(!kept.put("late.example.org", 1_000_001));
    assert!(kept.put("n7.example.org", 1_050_000));
    assert_eq!(kept.tidy(1_000_000 + LIFE_SECONDS + 1).len(), MAX_HOMESERVERS - 1);
    assert!(kept.put("late.example.org", 1_000_000 + LIFE_SECONDS + 1));
    assert_eq!(kept.homeservers.len(), 2);
}
