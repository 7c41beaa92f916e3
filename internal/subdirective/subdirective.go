// Package subdirective has what the directives' parsers share: the walk over a
// block, and the kinds of arguments. Errors name the subdirective and quote the value.
package subdirective

import (
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strconv"

	"github.com/dustin/go-humanize"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// Each calls parse for every subdirective of a block. parse takes all arguments,
// and the block if it wants one, and returns false for a name that it does not
// know. Only those named may be there twice.
func Each(d *caddyfile.Dispenser, repeatable []string, parse func(name string) (known bool, err error)) error {
	seen := make(map[string]bool)
	last := ""
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		name := d.Val()
		if name == "{" {
			return d.Errf("%s: surplus block", last)
		}
		last = name
		if seen[name] && !slices.Contains(repeatable, name) {
			return d.Errf("%s: repeated", name)
		}
		seen[name] = true
		known, err := parse(name)
		if err != nil {
			return err
		}
		if !known {
			return d.Errf("unrecognized subdirective %q", name)
		}
	}
	return nil
}

// Argument is a setting that is one argument.
type Argument interface{ Parse(arg string) error }

// Duration is a setting that is a duration, and whether `off` turns it off.
type Duration struct {
	To  **caddy.Duration
	Off bool
}

func (f Duration) Parse(arg string) error {
	if arg == "off" && f.Off {
		*f.To = new(caddy.Duration)
		return nil
	}
	parsed, err := caddy.ParseDuration(arg)
	if err != nil {
		return fmt.Errorf("invalid duration %q", arg)
	}
	value := caddy.Duration(parsed)
	*f.To = &value
	return nil
}

// Size is a setting that is a size, like `5MiB`.
type Size struct{ To **int64 }

func (f Size) Parse(arg string) error {
	parsed, err := humanize.ParseBytes(arg)
	if err != nil || parsed > math.MaxInt64 {
		return fmt.Errorf("invalid size %q", arg)
	}
	value := int64(parsed)
	*f.To = &value
	return nil
}

// Number is a setting that is a number.
type Number struct{ To **int }

func (f Number) Parse(arg string) error {
	parsed, err := strconv.Atoi(arg)
	if err != nil {
		return fmt.Errorf("invalid number %q", arg)
	}
	*f.To = &parsed
	return nil
}

// Factor is a setting that is a number which need not be whole.
type Factor struct{ To **float64 }

func (f Factor) Parse(arg string) error {
	parsed, err := strconv.ParseFloat(arg, 64)
	if err != nil {
		return fmt.Errorf("invalid factor %q", arg)
	}
	*f.To = &parsed
	return nil
}

// Word is a setting that is a word.
type Word struct{ To *string }

func (f Word) Parse(arg string) error {
	if arg == "" { // which would mean unset
		return fmt.Errorf("invalid value %q", arg)
	}
	*f.To = arg
	return nil
}

// Flag takes a subdirective that has no arguments.
func Flag(d *caddyfile.Dispenser, to *bool) error {
	name := d.Val()
	*to = true
	return Count(d, name, d.RemainingArgs(), 0, 0)
}

// One takes the one argument of a subdirective.
func One(d *caddyfile.Dispenser, to Argument) error { return Some(d, 1, to) }

// Some takes the arguments of a subdirective, of which the first ones must be there.
func Some(d *caddyfile.Dispenser, least int, to ...Argument) error {
	name, args := d.Val(), d.RemainingArgs()
	if err := Count(d, name, args, least, len(to)); err != nil {
		return err
	}
	for i, arg := range to {
		if i < len(args) {
			if err := arg.Parse(args[i]); err != nil {
				return d.Errf("%s: %w", name, err)
			}
		}
	}
	return nil
}

// Join returns all of several groups' arguments.
func Join(groups ...map[string]Argument) map[string]Argument {
	all := make(map[string]Argument)
	for _, g := range groups {
		maps.Copy(all, g)
	}
	return all
}

// NilIfZero returns nil for a group of settings in which nothing is set.
func NilIfZero[T any](group *T) *T {
	if reflect.ValueOf(group).Elem().IsZero() {
		return nil
	}
	return group
}

// Count refuses arguments that are missing, or too many.
func Count(d *caddyfile.Dispenser, name string, args []string, least, most int) error {
	switch {
	case len(args) < least:
		return d.Errf("%s: missing argument", name)
	case len(args) > most:
		return d.Errf("%s: surplus argument %q", name, args[most])
	default:
		return nil
	}
}
