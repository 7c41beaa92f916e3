// Command testreport turns the output of "go test -json" into that of a plain
// "go test", and fails if a test was skipped, which go test keeps quiet about.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

func main() {
	ok, err := report(os.Stdin, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

// event is a line of "go test -json"; see "go doc test2json" and "go help
// buildjson".
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
}

// result gathers what one test printed.
type result struct {
	action string // empty until the test has ended
	output strings.Builder
}

// results are those of one package, in the order in which its tests began.
// What the package itself printed is under the empty name.
type results struct {
	order  []*result
	byTest map[string]*result
}

// report copies the events from r to w as they come in: a line per package,
// failures in full. It tells whether tests ran and all of them passed.
func report(r io.Reader, w io.Writer) (bool, error) {
	var (
		packages = make(map[string]*results)
		skips    strings.Builder

		passed, failed, skipped int
		broken                  bool // a package failed, its tests apart
	)

	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil && err != io.EOF {
			return false, err
		}
		if len(line) == 0 {
			break
		}
		var e event
		if json.Unmarshal(line, &e) != nil {
			fmt.Fprintf(w, "%s", line) // go itself complains
			continue
		}
		switch e.Action {
		case "build-output":
			fmt.Fprint(w, e.Output)
			continue
		case "build-fail":
			broken = true
			continue
		}

		pkg := packages[e.Package]
		if pkg == nil {
			pkg = &results{byTest: make(map[string]*result)}
			packages[e.Package] = pkg
		}
		res := pkg.byTest[e.Test]
		if res == nil {
			res = new(result)
			pkg.byTest[e.Test] = res
			pkg.order = append(pkg.order, res)
		}

		switch e.Action {
		case "output":
			res.output.WriteString(e.Output)
			continue
		case "pass", "fail", "skip":
			res.action = e.Action
		default:
			continue
		}
		switch {
		case e.Test == "":
			// A package without test files is a skip too, but hides no test.
			broken = broken || e.Action == "fail"
			pkg.print(w)
			delete(packages, e.Package)
		case e.Action == "pass":
			passed++
		case e.Action == "fail":
			failed++
		case e.Action == "skip":
			skipped++
			fmt.Fprintf(&skips, "%s: %s\n", e.Package, e.Test)
			printOutput(&skips, res)
		}
	}

	// Packages are left over when go test itself dies.
	for _, pkg := range packages {
		broken = true
		pkg.print(w)
	}
	if skipped > 0 {
		fmt.Fprintf(w, "\nskipped tests count as failures:\n%s\n", skips.String())
	}
	ok := !broken && failed == 0 && skipped == 0 && passed > 0
	status := "ok"
	if !ok {
		status = "FAIL"
	}
	fmt.Fprintf(w, "%s: %d passed, %d failed, %d skipped\n", status, passed, failed, skipped)
	return ok, nil
}

// print writes what a plain go test would: of a package that passed its last
// line, of one that failed all that its failed tests printed.
func (p *results) print(w io.Writer) {
	own := p.byTest[""]
	if own == nil || own.action == "" || own.action == "fail" {
		for _, res := range p.order {
			if res != own && res.mattersToFailure() {
				printOutput(w, res)
			}
		}
		if own != nil {
			printOutput(w, own)
		}
		return
	}
	text := strings.TrimSuffix(own.output.String(), "\n")
	fmt.Fprintln(w, text[strings.LastIndexByte(text, '\n')+1:])
}

// mattersToFailure is true of tests that failed or never ended, and of those
// during which the runtime wrote a report: it goes to whichever test spoke
// last, and that one may have passed.
func (r *result) mattersToFailure() bool {
	if r.action != "pass" && r.action != "skip" {
		return true
	}
	text := r.output.String()
	for _, report := range []string{"WARNING: DATA RACE", "panic: ", "fatal error: "} {
		if strings.Contains(text, report) {
			return true
		}
	}
	return false
}

// printOutput leaves out the lines that only -v adds.
func printOutput(w io.Writer, res *result) {
	for line := range strings.Lines(res.output.String()) {
		if !strings.HasPrefix(line, "=== ") {
			fmt.Fprint(w, line)
		}
	}
}
