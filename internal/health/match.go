// This file decides whether a response is the expected one.

package health

import (
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// expectation is what a response's status and header must be.
type expectation struct {
	status []statusRange
	fields []fieldRule
}

// newExpectation compiles the rules of x. status is what is expected if x does not
// say.
func newExpectation(x *Exchange, status string) (expectation, error) {
	var e expectation
	want := x.ExpectStatus
	if len(want) == 0 {
		want = []string{status}
	}
	for _, s := range want {
		r, err := parseStatus(s)
		if err != nil {
			return e, fmt.Errorf("expect_status: %w", err)
		}
		e.status = append(e.status, r)
	}
	for _, rule := range x.ExpectHeaders {
		f, err := rule.compile()
		if err != nil {
			return e, fmt.Errorf("expect_header: %w", err)
		}
		e.fields = append(e.fields, f)
	}
	return e, nil
}

// check returns what is wrong with a response, or nil.
func (e *expectation) check(res *http.Response) error {
	if !slices.ContainsFunc(e.status, func(r statusRange) bool { return r.has(res.StatusCode) }) {
		return fmt.Errorf("unexpected status %d", res.StatusCode)
	}
	for _, f := range e.fields {
		if values := res.Header.Values(f.name); !f.matches(values) {
			if len(values) == 0 {
				return fmt.Errorf("expect_header: no %s", f.name)
			}
			return fmt.Errorf("expect_header: unexpected %s %.100q", f.name, strings.Join(values, ", "))
		}
	}
	return nil
}

// statusRange is a set of status codes, both ends included.
type statusRange struct{ from, to int }

func (r statusRange) has(code int) bool { return r.from <= code && code <= r.to }

// parseStatus reads a code, a range of two codes, or a class like 2xx.
func parseStatus(s string) (statusRange, error) {
	from, to, isRange := strings.Cut(s, "-")
	if class, ok := strings.CutSuffix(s, "xx"); ok {
		from, to, isRange = class+"00", class+"99", true
	}
	if !isRange {
		to = from
	}
	r := statusRange{statusCode(from), statusCode(to)}
	if r.from == 0 || r.to < r.from {
		return statusRange{}, fmt.Errorf("invalid status %q", s)
	}
	return r, nil
}

// statusCode reads three digits that do not begin with 0 (RFC 9110 §15), and
// returns 0 for anything else.
func statusCode(s string) (code int) {
	if len(s) != 3 || s[0] == '0' {
		return 0
	}
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return 0
		}
		code = 10*code + int(c-'0')
	}
	return code
}

// fieldRule is a compiled HeaderRule.
type fieldRule struct {
	name    string
	matches func(values []string) bool
}

func (r *HeaderRule) compile() (fieldRule, error) {
	if r == nil { // a null in JSON
		r = new(HeaderRule)
	}
	if !httpguts.ValidHeaderFieldName(r.Field) {
		return fieldRule{}, fmt.Errorf("invalid field %q", r.Field)
	}
	f := fieldRule{name: http.CanonicalHeaderKey(r.Field)}
	switch {
	case r.Value != nil && r.Pattern != "":
		return f, fmt.Errorf("%s: value %q and pattern %q exclude each other", f.name, *r.Value, r.Pattern)
	case r.Pattern != "":
		re, err := compilePattern(r.Pattern)
		if err != nil {
			return f, err
		}
		f.matches = func(values []string) bool { return slices.ContainsFunc(values, re.MatchString) }
	case r.Value == nil:
		f.matches = func(values []string) bool { return len(values) > 0 }
	case *r.Value == "":
		f.matches = func(values []string) bool {
			return !slices.ContainsFunc(values, func(v string) bool { return v != "" })
		}
	default:
		want := *r.Value
		f.matches = func(values []string) bool { return slices.Contains(values, want) }
	}
	return f, nil
}

func compilePattern(pattern string) (*regexp.Regexp, error) {
	if pattern == "" {
		return nil, errors.New(`invalid regexp ""`)
	}
	re, err := regexp.Compile(pattern)
	if err != nil {
		return nil, fmt.Errorf("invalid regexp %q: %w", pattern, err)
	}
	return re, nil
}
