// This file tests the names of treatments.

package tunnel

import "testing"

func TestTreatmentNames(t *testing.T) {
	for _, treatment := range []Treatment{Standard, Extended, Immortal} {
		got, err := ParseTreatment(treatment.String())
		if err != nil || got != treatment {
			t.Errorf("%v: got %v, %v, want itself", treatment, got, err)
		}
	}
	for _, name := range []string{"", "Standard", "Treatment(3)", "eternal"} {
		if got, err := ParseTreatment(name); err == nil {
			t.Errorf("%q: got %v, want an error", name, got)
		}
	}
	if got := Treatment(3).String(); got != "Treatment(3)" {
		t.Errorf("got %q, want Treatment(3)", got)
	}
}
