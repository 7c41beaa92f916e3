// This file tests which responses are the expected ones.

package health

import (
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestStatus(t *testing.T) {
	for _, test := range []struct {
		status   string
		from, to int
	}{
		{"101", 101, 101},
		{"200-299", 200, 299},
		{"200-200", 200, 200},
		{"100-999", 100, 999},
		{"2xx", 200, 299},
		{"9xx", 900, 999},
	} {
		got, err := parseStatus(test.status)
		if want := (statusRange{test.from, test.to}); err != nil || got != want {
			t.Errorf("%q: got %v, %v, want %v", test.status, got, err, want)
		}
	}
	for _, status := range []string{
		"", "2", "20", "2000", "099", "0xx", "xx", "xxx", "2XX", "2xy", "20x", "2xxx", "-", "200-", "-299", "299-200",
		"200-2xx", "2xx-3xx", "200-300-400", "200 - 299", " 200", "+20", "-20", "2.0", "２００", "200,201",
	} {
		if got, err := parseStatus(status); err == nil || err.Error() != `invalid status `+strconv.Quote(status) {
			t.Errorf("%q: got %v, %v, want it refused with its name", status, got, err)
		}
	}
}

func TestHeaderRule(t *testing.T) {
	value := func(s string) *string { return &s }
	for _, test := range []struct {
		name   string
		rule   HeaderRule
		values []string
		want   bool
	}{
		{"present", HeaderRule{}, []string{"x"}, true},
		{"present, in another case", HeaderRule{Field: "x-FIELD"}, []string{"x"}, true},
		{"present and empty", HeaderRule{}, []string{""}, true},
		{"not present", HeaderRule{}, nil, false},

		{"empty: absent", HeaderRule{Value: value("")}, nil, true},
		{"empty: empty", HeaderRule{Value: value("")}, []string{""}, true},
		{"empty: all empty", HeaderRule{Value: value("")}, []string{"", ""}, true},
		{"empty: has a value", HeaderRule{Value: value("")}, []string{"x"}, false},
		{"empty: one of two has a value", HeaderRule{Value: value("")}, []string{"", "x"}, false},

		{"exact", HeaderRule{Value: value("yes")}, []string{"yes"}, true},
		{"exact: the last of several", HeaderRule{Value: value("yes")}, []string{"no", "yes"}, true},
		{"exact: in another case", HeaderRule{Value: value("yes")}, []string{"Yes"}, false},
		{"exact: a part", HeaderRule{Value: value("yes")}, []string{"yes, no"}, false},
		{"exact: looks like a pattern", HeaderRule{Value: value("~y.s")}, []string{"~y.s"}, true},
		{"exact: looks like a pattern, which it is not", HeaderRule{Value: value("~y.s")}, []string{"yes"}, false},
		{"exact: absent", HeaderRule{Value: value("yes")}, nil, false},

		{"pattern", HeaderRule{Pattern: `^v\d+$`}, []string{"v12"}, true},
		{"pattern: the last of several", HeaderRule{Pattern: `^v\d+$`}, []string{"x", "v1"}, true},
		{"pattern: a part", HeaderRule{Pattern: `v\d`}, []string{"a v1 b"}, true},
		{"pattern: another", HeaderRule{Pattern: `^v\d+$`}, []string{"v"}, false},
		{"pattern: not across values", HeaderRule{Pattern: `a.*b`}, []string{"a", "b"}, false},
		{"pattern that matches nothing: absent", HeaderRule{Pattern: `^$`}, nil, false},
		{"pattern that matches nothing: empty", HeaderRule{Pattern: `^$`}, []string{""}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			rule := test.rule
			if rule.Field == "" {
				rule.Field = "X-Field"
			}
			f, err := rule.compile()
			if err != nil {
				t.Fatal(err)
			}
			e := expectation{status: []statusRange{{200, 200}}, fields: []fieldRule{f}}
			err = e.check(&http.Response{StatusCode: 200, Header: http.Header{"X-Field": test.values, "X-Other": {"yes", "v1"}}})
			if (err == nil) != test.want {
				t.Errorf("got error %v, want passed %t", err, test.want)
			}
		})
	}
}

// Whatever a backend sends, an error stays short enough for a log.
func TestErrorsAreShort(t *testing.T) {
	e, err := newExpectation(&Exchange{ExpectHeaders: []*HeaderRule{{Field: "X", Pattern: "^no$"}}}, "2xx")
	if err != nil {
		t.Fatal(err)
	}
	long := slices.Repeat([]string{strings.Repeat("x\x00", 1000)}, 1000)
	if err := e.check(&http.Response{StatusCode: 200, Header: http.Header{"X": long}}); err == nil || len(err.Error()) > 500 {
		t.Errorf("got %v, want a short error", err)
	}
}

func FuzzStatus(f *testing.F) {
	for _, seed := range []string{"101", "200-299", "2xx", "2xx-3xx", "299-200", "0xx", "1000", "200-", "2x\xff"} {
		f.Add(seed)
	}
	form := regexp.MustCompile(`^(?:([1-9]\d\d)(?:-([1-9]\d\d))?|([1-9])xx)$`)
	f.Fuzz(func(t *testing.T, s string) {
		got, err := parseStatus(s)
		m := form.FindStringSubmatch(s)
		if m == nil || m[2] != "" && m[2] < m[1] {
			if err == nil {
				t.Fatalf("%q: got %v, want an error", s, got)
			}
			return
		}
		if err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		for code := range 1100 {
			text := strconv.Itoa(code)
			want := false
			switch {
			case len(text) != 3:
			case m[3] != "":
				want = text[:1] == m[3]
			case m[2] != "":
				want = m[1] <= text && text <= m[2]
			default:
				want = text == m[1]
			}
			if got.has(code) != want {
				t.Fatalf("%q has %d: got %t, want %t", s, code, got.has(code), want)
			}
		}
	})
}

// What a Caddyfile says of a field means the same once it has become a rule.
func FuzzHeaderRule(f *testing.F) {
	f.Add("X-Ready", "", "")
	f.Add("X-Ready", "yes", "yes")
	f.Add("X-Ready", "~^y", "yes")
	f.Add("X-Ready", "~", "")
	f.Add("X-Ready", "~(", "(")
	f.Add("x ready", "~~", "~")
	f.Fuzz(func(t *testing.T, field, arg, value string) {
		rule, err := parseRule([]string{field, arg})
		var compiled fieldRule
		if err == nil {
			compiled, err = rule.compile()
		}
		pattern, isPattern := strings.CutPrefix(arg, "~")
		re, reErr := regexp.Compile(pattern)
		if isPattern && (pattern == "" || reErr != nil) {
			if err == nil {
				t.Fatalf("%q: got no error", arg)
			}
			return
		}
		if err != nil {
			return // the field's name
		}
		want := value == arg
		if isPattern {
			want = re.MatchString(value)
		}
		if got := compiled.matches([]string{value}); got != want {
			t.Errorf("%q of %q: got %t, want %t", arg, value, got, want)
		}
		if got, want := compiled.matches(nil), arg == ""; got != want {
			t.Errorf("%q of nothing: got %t, want %t", arg, got, want)
		}
	})
}
