//! `lk-jwt-service doctor`: who may ask for it, how it is drawn, and which faults it names on a real deployment.

mod faults;
mod route;
pub(crate) mod stack;
mod users;

use std::collections::BTreeSet;

use lk_jwt_service::internals::doctor::fault;

const README: &str = include_str!("../../../README.md");

/// Text of a table's cell as the README has it.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;").replace('>', "&gt;")
}

#[test]
fn the_readme_explains_every_fault_and_no_other() {
    let table = README.split_once("<!-- faults -->").expect("a table of faults").1;
    let table = table.split_once("<!-- /faults -->").expect("its end").0;
    let rows: Vec<_> = table.lines().filter(|line| line.starts_with("| <a id=")).collect();
    let wanted: Vec<_> = fault::ALL
        .iter()
        .map(|fault| {
            let (means, remedy) = (cell(fault.means), cell(fault.remedy));
            format!("| <a id=\"{0}\"></a>`{0}` | {means} | {remedy} |", fault.id)
        })
        .collect();
    assert_eq!(rows, wanted, "the table has to be:\n{}", wanted.join("\n"));
    let ids: BTreeSet<_> = fault::ALL.iter().map(|fault| fault.id).collect();
    assert_eq!(ids.len(), fault::ALL.len(), "two faults have one name");
}
