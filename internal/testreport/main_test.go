package main

import (
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	const (
		pass = `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"log of A\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"--- PASS: TestA (0.00s)\n"}
{"Action":"pass","Package":"p","Test":"TestA"}
`
		skip = `{"Action":"output","Package":"p","Test":"TestB","Output":"=== RUN   TestB\n"}
{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:7: no browser\n"}
{"Action":"output","Package":"p","Test":"TestB","Output":"--- SKIP: TestB (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"TestB"}
`
		fail = `{"Action":"output","Package":"p","Test":"TestC","Output":"=== RUN   TestC\n"}
{"Action":"output","Package":"p","Test":"TestC","Output":"    c_test.go:7: got 1, want 2\n"}
{"Action":"output","Package":"p","Test":"TestC","Output":"--- FAIL: TestC (0.00s)\n"}
{"Action":"fail","Package":"p","Test":"TestC"}
`
		race = `{"Action":"output","Package":"p","Test":"TestD","Output":"WARNING: DATA RACE\n"}
{"Action":"pass","Package":"p","Test":"TestD"}
`
		unended = `{"Action":"output","Package":"p","Test":"TestE","Output":"panic: test timed out after 1s\n"}
`
		packagePass = `{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"output","Package":"p","Output":"ok  \tp\t0.01s\n"}
{"Action":"pass","Package":"p"}
`
		packageFail = `{"Action":"output","Package":"p","Output":"FAIL\tp\t0.01s\n"}
{"Action":"fail","Package":"p"}
`
		packageEmpty = `{"Action":"output","Package":"q","Output":"?   \tq\t[no test files]\n"}
{"Action":"skip","Package":"q"}
`
	)

	for _, tc := range []struct {
		name, in, want string
		ok             bool
	}{
		{
			"passing", pass + packagePass + packageEmpty,
			"ok  \tp\t0.01s\n?   \tq\t[no test files]\nok: 1 passed, 0 failed, 0 skipped\n", true,
		},
		{
			"skipped", pass + skip + packagePass,
			"ok  \tp\t0.01s\n\nskipped tests count as failures:\np: TestB\n    b_test.go:7: no browser\n" +
				"--- SKIP: TestB (0.00s)\n\nFAIL: 1 passed, 0 failed, 1 skipped\n", false,
		},
		{
			"failing", pass + fail + packageFail,
			"    c_test.go:7: got 1, want 2\n--- FAIL: TestC (0.00s)\nFAIL\tp\t0.01s\n" +
				"FAIL: 1 passed, 1 failed, 0 skipped\n", false,
		},
		{
			"race reported during a test that passed", race + packageFail,
			"WARNING: DATA RACE\nFAIL\tp\t0.01s\nFAIL: 1 passed, 0 failed, 0 skipped\n", false,
		},
		{
			"timed out", unended + packageFail,
			"panic: test timed out after 1s\nFAIL\tp\t0.01s\nFAIL: 0 passed, 0 failed, 0 skipped\n", false,
		},
		{
			"cut off", pass + unended,
			"panic: test timed out after 1s\nFAIL: 1 passed, 0 failed, 0 skipped\n", false,
		},
		{
			"not building", `{"Action":"build-output","ImportPath":"p","Output":"p.go:1: undefined: x\n"}
{"Action":"build-fail","ImportPath":"p"}
`,
			"p.go:1: undefined: x\nFAIL: 0 passed, 0 failed, 0 skipped\n", false,
		},
		{"not running", packageEmpty, "?   \tq\t[no test files]\nFAIL: 0 passed, 0 failed, 0 skipped\n", false},
		{"not JSON", "go: no packages\n", "go: no packages\nFAIL: 0 passed, 0 failed, 0 skipped\n", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out strings.Builder
			ok, err := report(strings.NewReader(tc.in), &out)
			if err != nil {
				t.Fatal(err)
			}
			if got := out.String(); got != tc.want {
				t.Errorf("got output\n%s\nwant\n%s", got, tc.want)
			}
			if ok != tc.ok {
				t.Errorf("got ok %t, want %t", ok, tc.ok)
			}
		})
	}
}
